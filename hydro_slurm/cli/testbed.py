"""`hydro testbed`: a private Slurm cluster on this machine."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from typing import Any

from hydro_slurm.slurm.environment import scrubbed_environment
from hydro_slurm.testbed import Testbed, TestbedSpec, TestbedStatus, list_testbeds

DEFAULT_NAME = "testbed"


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add the command group to the parser of `hydro`."""
    about = "start, show, stop a private Slurm cluster on this machine, and run commands in it"
    parser = subparsers.add_parser("testbed", help=about, description=about)
    commands = parser.add_subparsers(dest="testbed_command", required=True)

    up = commands.add_parser("up", help="start a cluster and wait until every node is idle")
    spec = TestbedSpec()
    up.add_argument("--name", default=DEFAULT_NAME, help="what to call it (default: %(default)s)")
    up.add_argument("--nodes", type=int, default=spec.nodes, help="number of nodes (default: %(default)s)")
    up.add_argument("--cpus", type=int, default=spec.cpus, help="CPUs of each node (default: %(default)s)")
    up.add_argument("--memory-mib", type=int, default=spec.memory_mib, help="their memory (default: %(default)s)")
    up.add_argument("--gres", default=spec.gres, help="GRES of each node, such as gpu:2 (default: none)")
    up.set_defaults(func=_up)

    status = commands.add_parser("status", help="show the clusters that are up; clean up after dead ones")
    status.add_argument("--name", help="only this one (default: all)")
    status.add_argument("--json", action="store_true", help="print JSON")
    status.set_defaults(func=_status)

    down = commands.add_parser("down", help="stop a cluster and everything that runs in it")
    down.add_argument("--name", help="which one (default: the only one)")
    down.set_defaults(func=_down)

    execute = commands.add_parser("exec", help="run a command in a cluster: hydro testbed exec -- sinfo")
    execute.add_argument("--name", help="in which one (default: the only one)")
    execute.add_argument("--user", help="as which user (default: the caller)")
    execute.add_argument("--node", help="on which node (default: the login machine)")
    execute.add_argument("command", nargs="+", metavar="COMMAND", help="the command and its arguments, after --")
    execute.set_defaults(func=_exec)


def _up(arguments: argparse.Namespace) -> int:
    spec = TestbedSpec(
        name=arguments.name,
        nodes=arguments.nodes,
        cpus=arguments.cpus,
        memory_mib=arguments.memory_mib,
        gres=arguments.gres,
    )
    testbed = Testbed.up(spec)
    _print_status(testbed.status())
    print(f"run commands in it:  hydro testbed exec --name {testbed.name} -- sinfo")
    return 0


def _status(arguments: argparse.Namespace) -> int:
    testbeds = list_testbeds()
    if arguments.name is not None:
        testbeds = [Testbed.load(arguments.name)]
    found = [testbed.status() for testbed in testbeds]
    if arguments.json:
        print(json.dumps([dataclasses.asdict(status) for status in found], indent=1))
        return 0
    for status in found:
        _print_status(status)
    if not found:
        print("no testbed is up")
    return 0


def _down(arguments: argparse.Namespace) -> int:
    testbed = Testbed.load(arguments.name)
    testbed.down()
    print(f"testbed {testbed.name} is down")
    return 0


def _exec(arguments: argparse.Namespace) -> int:
    testbed = Testbed.load(arguments.name)
    prefix = testbed.command_prefix(arguments.user, arguments.node)
    os.execvpe(prefix[0], [*prefix, *arguments.command], scrubbed_environment())


def _print_status(status: TestbedStatus) -> None:
    slurm = f"Slurm {status.slurm_version}" if status.slurm_version else "slurmctld does not answer"
    print(f"{status.name}: {status.phase}, {slurm}, {status.num_processes} processes, SLURM_CONF={status.slurm_conf}")
    for node in status.nodes:
        gres = f", {node.gres}" if node.gres else ""
        print(f"  {node.name}  {node.state.lower()}  {node.cpus} CPUs, {node.memory_mib} MiB{gres}")
