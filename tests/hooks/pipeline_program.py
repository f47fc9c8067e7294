"""What the DeepSpeed tests run on two ranks: the same training three times, alone, sharing, and with a broken gate.

Prints one JSON object: the losses of each run, and what was seen of the gate. Arguments: RANK FOLDER.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import PipelineModule
from torch import Tensor, nn

import hydro_slurm.hooks.deepspeed as hook
from hydro_slurm.errors import GateError
from hydro_slurm.gate.reader import GateReader
from hydro_slurm.gate.writer import GateWriter
from hydro_slurm.hooks.deepspeed import Attachment, share_bubbles

MICROBATCHES, ITERATIONS, WIDTH, BATCH = 4, 24, 512, 96


def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(BATCH, WIDTH, generator=generator), torch.randn(BATCH, WIDTH, generator=generator)


def build_engine() -> Any:
    torch.manual_seed(3)
    layers: list[nn.Module] = []
    for _ in range(8):
        layers += [nn.Linear(WIDTH, WIDTH), nn.Tanh()]
    module = PipelineModule(layers=layers, num_stages=2, loss_fn=nn.functional.mse_loss, partition_method="uniform")
    config = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": MICROBATCHES,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}},
        "gradient_clipping": 1.0,
        "steps_per_print": 10**9,
    }
    return deepspeed.initialize(model=module, model_parameters=list(module.parameters()), config=config)[0]


def watched(data: Iterator[Any], attachment: Attachment | None, states: list[str]) -> Iterator[Any]:
    """Notes the gate's state, as a neighbour sees it, whenever a batch is drawn."""
    for item in data:
        if attachment is not None and attachment.identity is not None:
            try:
                reader = GateReader.attach(attachment.identity.gate_dir)
                states.append(reader.state())
                reader.close()
            except GateError:
                states.append("gone")
        yield item


def train(engine: Any, attachment: Attachment | None, folder: Path) -> dict[str, Any]:
    data, evaluation_states = batches(1), list[str]()
    losses = []
    for iteration in range(ITERATIONS):
        losses.append(engine.train_batch(data_iter=data).item())
        if iteration == ITERATIONS // 2:
            evaluation = watched(batches(2), attachment, evaluation_states)
            losses.append(float(engine.eval_batch(evaluation)))
            engine.save_checkpoint(str(folder / "checkpoint"))
    return {"losses": losses, "evaluation_states": evaluation_states}


class BrokenGate(GateWriter):
    """Fails as soon as it is used."""

    def open(self, deadline_ns: int, *, iteration: int = 0, free_bytes: int = 0) -> None:
        raise OSError("No space left on device")


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    results: dict[str, Any] = {"alone": train(build_engine(), None, folder)}

    engine = build_engine()
    before = dict(engine.__dict__)
    os.environ["HYDRO_TIMELINE_DIR"] = str(folder / "timeline")
    attachment = share_bubbles(engine, control_share=0.5, report_s=0.2)
    del os.environ["HYDRO_TIMELINE_DIR"]
    assert attachment.reporter is not None
    assert attachment.identity is not None
    results["sharing"] = train(engine, attachment, folder)
    results["sharing"]["num_usable"] = attachment.reporter.predictor.num_usable
    results["sharing"]["disabled"] = attachment.reporter.disabled
    gate_dir = attachment.identity.gate_dir
    results["sharing"]["gate_dir"] = str(gate_dir)
    dist.barrier()
    say("SHARED")
    sys.stdin.readline()  # the test has seen the report and the gate
    engine.destroy()
    results["sharing"]["gate_left"] = (gate_dir / "page").exists()
    results["sharing"]["restored"] = all(
        engine.__dict__.get(name) is before.get(name)
        for name in ("_INSTRUCTION_MAP", "train_batch", "eval_batch", "save_checkpoint", "destroy")
    )

    engine = build_engine()
    unwritable = folder / "a-file"
    unwritable.write_text("not a directory")
    hook.GateWriter = BrokenGate  # type: ignore[misc]
    attachment = share_bubbles(engine, control_share=0.01, report_s=0.2, report_dir=unwritable / "slots")
    assert attachment.reporter is not None
    results["broken"] = train(engine, attachment, folder)
    results["broken"]["disabled"] = attachment.reporter.disabled
    attachment.close()

    engine = build_engine()
    hook.SlotReports = None  # type: ignore[assignment, misc]
    attachment = share_bubbles(engine)
    results["not attached"] = {"reporter": str(attachment.reporter), "loss": engine.train_batch(batches(1)).item()}
    say(json.dumps(results))
    dist.barrier()


if __name__ == "__main__":
    main()
