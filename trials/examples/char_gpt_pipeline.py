# ruff: noqa: E402 (a rank is pinned before torch counts the cores)
"""A host job that shares its bubbles: a character-level GPT in pipeline stages, on CPUs.

    srun python char_gpt_pipeline.py --iterations 500

Trains on the sources of Python's standard library with DeepSpeed's `PipelineModule` (1F1B). Each rank is pinned to one
core. `share_bubbles(engine)` is the one line that a training script adds to share its bubbles.

For measuring, `--arms alone,bubbles,bubbles,colocated,exclusive` splits the run into blocks of iterations, in random
order, the same on all ranks; each round holds every named arm once. An arm named twice comes twice; one written `arm:N`
has N iterations instead of --block-iterations; arms joined by `+` stay side by side, in random order too:

    alone       the gates stay closed
    bubbles     the normal mode
    colocated   the gates are held open: what sharing without a gate would do
    exclusive   the host waits, with its gates held open: the bundles alone

Each block adds one line to `blocks.RANK.jsonl` in the timeline directory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import socket
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RANK = int(os.environ.get("SLURM_PROCID") or os.environ.get("RANK") or 0)
WORLD_SIZE = int(os.environ.get("SLURM_NTASKS") or os.environ.get("WORLD_SIZE") or 1)


def pin_to_core() -> None:
    """One core per rank, before torch counts the cores that it may use."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 1:
        os.sched_setaffinity(0, {cores[RANK % len(cores)]})
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["DS_ACCELERATOR"] = "cpu"


if __name__ == "__main__":
    pin_to_core()

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from hydro_slurm.hooks.deepspeed import Attachment, share_bubbles
from hydro_slurm.hooks.reporter import Iteration

ARM_MODES = {"warmup": "bubbles", "alone": "closed", "bubbles": "bubbles", "colocated": "open", "exclusive": "open"}
WARM_UP_ITERATIONS = 15

# Shape suffixes: B = sequences, T = characters, C = width, H = heads, D = head size, V = vocabulary.


class Embedding(nn.Module):
    def __init__(self, vocabulary: int, width: int, seq_len: int) -> None:
        super().__init__()
        self.characters, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(seq_len, width)

    def forward(self, x_BT: Tensor) -> Tensor:
        x_BTC: Tensor = self.characters(x_BT) + self.positions.weight
        return x_BTC


class Block(nn.Module):
    """Attention and a two-layer perceptron, both behind a norm and beside a residual."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_attention, self.norm_perceptron = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values, self.join = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BTC: Tensor) -> Tensor:
        B, T, C = x_BTC.shape
        qkv_3BHTD = self.queries_keys_values(self.norm_attention(x_BTC)).view(B, T, 3, self.num_heads, -1)
        q_BHTD, k_BHTD, v_BHTD = qkv_3BHTD.permute(2, 0, 3, 1, 4)
        y_BHTD = scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=True)
        x_BTC = x_BTC + self.join(y_BHTD.transpose(1, 2).reshape(B, T, C))
        y_BTC: Tensor = x_BTC + self.contract(torch.relu(self.expand(self.norm_perceptron(x_BTC))))
        return y_BTC


class Readout(nn.Module):
    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.norm, self.characters = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, x_BTC: Tensor) -> Tensor:
        x_BTV: Tensor = self.characters(self.norm(x_BTC))
        return x_BTV


def next_character_loss(logits_BTV: Tensor, next_BT: Tensor) -> Tensor:
    return cross_entropy(logits_BTV.flatten(0, 1), next_BT.flatten())


def read_text(max_bytes: int = 4 << 20) -> str:
    """The sources of Python's standard library, as far as they are ASCII."""
    parts, size = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            text = path.read_text(encoding="ascii")
            parts.append(text)
            size += len(text)
        if size > max_bytes:
            break
    return "".join(parts)


def batches(text_N: Tensor, batch_size: int, seq_len: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Random snippets and the characters that follow; first and last stage draw the same ones."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts_B = torch.randint(len(text_N) - seq_len - 1, (batch_size,), generator=generator)
        snippets = torch.stack([text_N[start : start + seq_len + 1] for start in starts_B.tolist()])
        yield snippets[:, :-1].contiguous(), snippets[:, 1:].contiguous()


def connect(rendezvous: str | None) -> Path:
    """Join the other ranks through a file that all of them see: no port to agree on, none to collide."""
    environ = os.environ
    run = ".".join(environ.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"))
    path = Path(rendezvous or f".char-gpt-rendezvous.{run}").resolve()
    store = dist.FileStore(str(path), WORLD_SIZE)
    store.set(f"host.{RANK}", socket.gethostname())
    hosts = {store.get(f"host.{rank}") for rank in range(WORLD_SIZE)}
    if len(hosts) == 1:
        environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", store=store, rank=RANK, world_size=WORLD_SIZE)
    environ.update(RANK=str(RANK), WORLD_SIZE=str(WORLD_SIZE), LOCAL_RANK=environ.get("SLURM_LOCALID", str(RANK)))
    environ.setdefault("MASTER_ADDR", "127.0.0.1")  # DeepSpeed wants to see them; nobody connects to them
    environ.setdefault("MASTER_PORT", "0")
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    return path


def build_engine(options: argparse.Namespace, vocabulary: int) -> Any:
    torch.manual_seed(options.seed)
    torch.set_num_threads(1)
    layers = [
        LayerSpec(Embedding, vocabulary, options.width, options.seq_len),
        *[LayerSpec(Block, options.width, max(1, options.width // 32)) for _ in range(options.layers)],
        LayerSpec(Readout, vocabulary, options.width),
    ]
    module = PipelineModule(
        layers=layers, num_stages=WORLD_SIZE, loss_fn=next_character_loss, partition_method="type:Block"
    )
    config = {
        "train_micro_batch_size_per_gpu": options.micro_batch_size,
        "gradient_accumulation_steps": options.microbatches,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}},
        "gradient_clipping": 1.0,
        "steps_per_print": 1_000_000_000,
    }
    engine, _, _, _ = deepspeed.initialize(
        model=module, model_parameters=[p for p in module.parameters() if p.requires_grad], config=config
    )
    return engine


class Plan:
    """Which arm comes next: each round holds every named arm once, shuffled by the seed, alike on all ranks."""

    def __init__(self, arms: str, seed: int) -> None:
        named = [[arm.partition(":") for arm in group.split("+")] for group in arms.split(",") if group]
        self.arms = [[arm for arm, _, _ in group] for group in named]
        self.lengths = {arm: int(length) for group in named for arm, _, length in group if length.isdigit()}
        unknown = sorted({arm for group in self.arms for arm in group} - set(ARM_MODES))
        if unknown:
            raise SystemExit(f"--arms: got {', '.join(unknown)}, needed some of {', '.join(ARM_MODES)}")
        self._random, self._left = random.Random(seed), list[str]()
        self.round = -1
        """Number of the round that the latest arm belongs to; -1 before the first."""

    def next_arm(self) -> str:
        if not self.arms:
            return "bubbles"
        if not self._left:
            groups = self._random.sample(self.arms, len(self.arms))
            self._left = [arm for group in groups for arm in self._random.sample(group, len(group))]
            self.round += 1
        return self._left.pop()


class HostJob:
    """Trains in blocks of iterations; what happens at the end of a block, all ranks do together."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.iterations: list[Iteration] = []
        self.terminated = False
        text = read_text()
        characters = sorted(set(text))
        index = {character: number for number, character in enumerate(characters)}
        self.text_N = torch.tensor([index[character] for character in text])
        self.meeting_file = connect(options.rendezvous)
        self.engine = build_engine(options, len(characters))
        self.data = batches(self.text_N, options.micro_batch_size, options.seq_len, options.seed)
        self.plan = Plan(options.arms, options.seed)
        self.attachment: Attachment | None = None
        if options.share:
            self.attachment = share_bubbles(
                self.engine,
                max_slowdown=options.max_slowdown,
                control_share=options.control_share,
                quantile=options.quantile,
                window=options.window,
                report_s=options.report_every_s,
                timeline_dir=options.timeline_dir if options.record_timeline else None,
                on_iteration=self.iterations.append,
            )

    def run(self) -> None:
        num_done = num_blocks = 0
        arm = "warmup"
        while num_done < self.options.iterations:
            length = self.plan.lengths.get(arm, self.options.block_iterations)
            if num_blocks == 0:
                length = WARM_UP_ITERATIONS
            num_done += self.run_block(num_blocks, arm, min(length, self.options.iterations - num_done))
            num_blocks += 1
            stop, start = self.agree()
            if stop:
                break
            arm = self.plan.next_arm() if start else "warmup"
        self.close()

    def run_block(self, block: int, arm: str, num_iterations: int) -> int:
        """One block; returns how many iterations it trained."""
        attachment = self.attachment
        self.iterations.clear()
        if attachment is not None:
            attachment.set_mode(ARM_MODES[arm])
            if attachment.reporter is not None:
                attachment.reporter.resume(aligned=True)
        start_ns = time.monotonic_ns()
        loss = None
        if arm == "exclusive":
            time.sleep(self.options.exclusive_s)
            num_iterations = 0
        for _ in range(num_iterations):
            begin_ns = time.monotonic_ns()
            loss = self.engine.train_batch(data_iter=self.data)
            if attachment is None or attachment.reporter is None or attachment.reporter.disabled:
                now_ns = time.monotonic_ns()
                self.iterations.append(
                    Iteration(self.engine.global_steps, begin_ns, now_ns - begin_ns, "closed", False, ())
                )
        end_ns = time.monotonic_ns()
        if attachment is not None and attachment.reporter is not None:
            attachment.reporter.suspend()
        self.write_block(block, arm, start_ns, end_ns)
        if RANK == 0 and loss is not None:
            each_ms = (end_ns - start_ns) / 1e6 / max(1, num_iterations)
            print(
                f"iteration {self.engine.global_steps} loss {loss.item():.4f} {each_ms:.0f} ms per iteration arm {arm}",
                flush=True,
            )
        return num_iterations

    def agree(self) -> tuple[bool, bool]:
        """Whether to stop, and whether the arms may begin: rank 0 looks at the files, any rank may end it."""
        options = self.options
        flags = torch.zeros(2, dtype=torch.int64)
        if RANK == 0:
            flags[0] = int(options.stop_file is not None and options.stop_file.exists())
            flags[1] = int(options.start_file is None or options.start_file.exists())
        if self.terminated:
            flags[0] = 1
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return bool(flags[0]), bool(flags[1])

    def write_block(self, block: int, arm: str, start_ns: int, end_ns: int) -> None:
        if self.options.timeline_dir is None:
            return
        iterations = [
            {
                "iteration": one.iteration,
                "start_ns": one.start_ns,
                "dur_ns": one.dur_ns,
                "control": one.control,
                "gaps_ms": [round(gap.dur_ns / 1e6, 3) for gap in one.gaps],
                "gaps": [[gap.position, gap.start_ns, gap.dur_ns, gap.predicted_ns] for gap in one.gaps],
            }
            for one in self.iterations
        ]
        line = {
            "arm": arm,
            "block": block,
            "round": self.plan.round,
            "start_ns": start_ns,
            "end_ns": end_ns,
            "iterations": iterations,
        }
        with (self.options.timeline_dir / f"blocks.{RANK}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        if self.attachment is not None:
            self.attachment.close()
        dist.barrier()
        dist.destroy_process_group()
        if RANK == 0:
            self.meeting_file.unlink(missing_ok=True)


def parse_options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--report-every-s", type=float, default=15.0)
    parser.add_argument("--max-slowdown", type=float, default=0.01)
    parser.add_argument("--control-share", type=float, default=0.05)
    parser.add_argument("--quantile", type=float, default=0.25)
    parser.add_argument("--window", type=int, default=12)
    parser.add_argument("--timeline-dir", type=Path, help="directory for blocks and timelines; default: none written")
    parser.add_argument("--record-timeline", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--arms", default="", help="comma-separated: alone, bubbles, colocated, exclusive")
    parser.add_argument("--block-iterations", type=int, default=8)
    parser.add_argument("--exclusive-s", type=float, default=3.0)
    parser.add_argument("--start-file", type=Path, help="the arms begin when this file exists")
    parser.add_argument("--stop-file", type=Path, help="training ends when this file exists")
    parser.add_argument("--rendezvous", help="file through which the ranks meet; must not exist before")
    return parser.parse_args(argv)


def main() -> None:
    options = parse_options(sys.argv[1:])
    if options.timeline_dir is not None:
        options.timeline_dir.mkdir(parents=True, exist_ok=True)
    job = HostJob(options)

    def terminate(signum: int, frame: object) -> None:
        job.terminated = True

    signal.signal(signal.SIGTERM, terminate)
    job.run()


if __name__ == "__main__":
    main()
