"""`hydro study`: submit, run, list and show studies."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydro_slurm.errors import StudyError
from hydro_slurm.log import set_up_logging
from hydro_slurm.slurm import CommandLineClient
from hydro_slurm.study.controller import StudyController
from hydro_slurm.study.description import RECORD_NAME, StudySettings, read_study, studies_dir, study_dir
from hydro_slurm.study.report import as_plain, describe_text, read_status, read_summary
from hydro_slurm.study.submit import prepare_study, submit_study


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the group to the command line."""
    group = subparsers.add_parser("study", help="hyperparameter studies", description="Hyperparameter studies.")
    commands = group.add_subparsers(dest="command", metavar="COMMAND", required=True)

    submit = commands.add_parser(
        "submit",
        help="submit a study file as a job; returns at once",
        allow_abbrev=False,  # sbatch's --time is no short form of our --timeline
        description="Check FILE, create its study and submit the job that runs it. Options that are not listed here "
        "are handed to sbatch.",
    )
    submit.add_argument("file", type=Path, metavar="FILE", help="the study file")
    _add_settings(submit)
    submit.add_argument("--json", action="store_true", help="print one JSON object")
    submit.set_defaults(func=_submit, takes_sbatch_options=True, sbatch_options=[])

    run = commands.add_parser(
        "run",
        help="run a study inside a job",
        description="Inside a Slurm job: run the study of a FILE (created if it is new), or go on with one by name.",
    )
    run.add_argument("study", metavar="FILE|NAME", help="a study file, or the name or directory of a study")
    _add_settings(run)
    run.set_defaults(func=_run)

    listing = commands.add_parser("ls", help="list your studies", description="List your studies.")
    listing.add_argument("--json", action="store_true", help="print a JSON list")
    listing.set_defaults(func=_list)

    show = commands.add_parser("show", help="show one study", description="Show one study.")
    show.add_argument("study", metavar="NAME", help="its name or directory")
    show.add_argument("--json", action="store_true", help="print one JSON object")
    show.set_defaults(func=_show)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    defaults = StudySettings()
    parser.add_argument("--name", help="instead of the name in the file")
    parser.add_argument("--trials", type=int, help="instead of the number of trials in the file")
    parser.add_argument(
        "--bundle-mem-mib", type=int, default=defaults.bundle_mem_mib, help="memory of each bundle step (%(default)s)"
    )
    parser.add_argument(
        "--own-allocation",
        choices=("never", "when_no_host", "always"),
        default=defaults.own_allocation,
        help="whether bundles may run in the study's own job (%(default)s)",
    )
    parser.add_argument(
        "--host-wait-s", type=float, default=defaults.host_wait_s, help="how long to wait for a host job (%(default)s)"
    )
    parser.add_argument("--poll-s", type=float, default=defaults.poll_s, help="seconds between cycles (%(default)s)")
    parser.add_argument(
        "--slurm-poll-s",
        type=float,
        default=defaults.slurm_poll_s,
        help="seconds between questions to Slurm (%(default)s)",
    )
    parser.add_argument(
        "--checkpoint-every-s",
        type=float,
        default=defaults.checkpoint_every_s,
        help="seconds between checkpoints of a lane (%(default)s)",
    )
    parser.add_argument("--timeline", action="store_true", help="record what each bundle computes and when")


def _settings(arguments: argparse.Namespace) -> StudySettings:
    return StudySettings(**{field.name: getattr(arguments, field.name) for field in fields(StudySettings)})


def _submit(arguments: argparse.Namespace) -> int:
    client = CommandLineClient()
    client.version()  # without Slurm, say so before anything is created
    directory = prepare_study(arguments.file, _settings(arguments), name=arguments.name, trials=arguments.trials)
    try:
        job_id = submit_study(directory, client, arguments.sbatch_options)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    if arguments.json:
        print(json.dumps({"study": directory.name, "job_id": job_id, "directory": str(directory)}))
    else:
        print(f"study {directory.name} submitted as job {job_id}; follow it with `hydro study show {directory.name}`")
    return 0


def _run(arguments: argparse.Namespace) -> int:
    if "SLURM_JOB_ID" not in os.environ:
        raise StudyError("`hydro study run` runs inside a Slurm job: use `hydro study submit FILE`, or sbatch a script")
    set_up_logging(max(arguments.verbose, 1))
    CommandLineClient().version()  # without Slurm, say so before anything is created
    directory = _find_or_create(arguments)
    status = StudyController(directory).run()
    summary = read_summary(directory)
    if summary:
        print(describe_text(summary))
    return status


def _find_or_create(arguments: argparse.Namespace) -> Path:
    file = Path(arguments.study)
    if not file.is_file():
        return study_dir(arguments.study)
    name = arguments.name
    for record_path in studies_dir().glob(f"*/{RECORD_NAME}"):
        record = read_study(record_path.parent)
        if record.file == str(file.absolute()) and name in (None, record.name):
            return record_path.parent  # requeued, or submitted again: go on
    return prepare_study(file, _settings(arguments), name=name, trials=arguments.trials)


def _list(arguments: argparse.Namespace) -> int:
    rows: list[dict[str, Any]] = []
    for path in sorted(studies_dir().glob(f"*/{RECORD_NAME}")):
        status = read_status(path.parent)
        rows.append(
            {
                "name": path.parent.name,
                "phase": status.phase if status else "submitted",
                "job_id": status.job_id if status else None,
                "counts": status.counts if status else {},
                "bundles": status.bundles if status else [],
            }
        )
    if arguments.json:
        print(json.dumps(rows))
        return 0
    if not rows:
        print(f"no studies in {studies_dir()}")
    for row in rows:
        counts = " ".join(f"{state}={count}" for state, count in row["counts"].items() if count)
        print(f"{row['name']:<24} {row['phase']:<10} job={row['job_id'] or '-':<8} {counts}")
    return 0


def _show(arguments: argparse.Namespace) -> int:
    directory = study_dir(arguments.study)
    record, status, summary = read_study(directory), read_status(directory), read_summary(directory)
    if arguments.json:
        print(
            json.dumps(
                {
                    "study": as_plain(record),
                    "status": as_plain(status) if status else None,
                    "summary": as_plain(summary) if summary else None,
                    "directory": str(directory),
                }
            )
        )
        return 0
    print(f"study {record.name}  file {record.file}  directory {directory}")
    if status:
        age_s = time.time() - status.written_at_s
        counts = "  ".join(f"{state} {count}" for state, count in status.counts.items() if count)
        print(f"  phase {status.phase}  job {status.job_id}  {counts}  ({age_s:.0f} s ago)")
        print(f"  bundles: {', '.join(status.bundles) or 'none'}")
    else:
        print("  its controller has not started yet")
    if summary:
        print(describe_text(summary))
    return 0
