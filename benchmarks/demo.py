"""The demo's figures as claims: one run of `hydro demo`, everything measured in it, interleaved."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from harness import Claim, write_claims

from hydro_slurm.demo.run import DemoSettings, run_demo


def claims_of(summary: dict[str, Any]) -> list[Claim]:
    """The summary's figures under their stable names. Slowdowns as fractions of the iteration time."""
    host, study = summary["host"], summary["study"]
    claims = []
    for arm, goal, better in (("bubbles", 0.02, "lower"), ("colocated", None, "higher")):
        low, high = host["slowdown_ci95"][arm]
        claims.append(
            Claim(
                name=f"slowdown.{arm}",
                value=host["slowdown"][arm],
                unit="fraction",
                goal=goal,
                better=better,
                ci95=(low, high),
                n=host["slowdown_n"][arm],
            )
        )
    n = host["slowdown_n"]["bubbles"]
    for name, value, goal in (
        ("bubble_used", host["bubble_used"], 0.6),
        ("exclusive_throughput_share", study["exclusive_throughput_share"], None),
    ):
        claims.append(Claim(name=name, value=value, unit="fraction", goal=goal, better="higher", ci95=None, n=n))
    return claims


def main() -> None:
    """Run the demo and write its claims."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("build/bench/demo.json"))
    parser.add_argument("--trials", type=int, default=DemoSettings(output=Path()).num_trials)
    arguments = parser.parse_args()
    summary = run_demo(DemoSettings(output=arguments.output.parent / "demo", num_trials=arguments.trials))
    write_claims(arguments.output, claims_of(summary))


if __name__ == "__main__":
    main()
