"""The configuration files of a testbed's Slurm."""

from __future__ import annotations

import os
import pwd
import re
from pathlib import Path

from hydro_slurm.testbed.spec import TestbedSpec, parse_gres

CONTROLLER, LOGIN = "ctl", "login"
"""Names of the two machines that are no nodes."""

_SLURM_CONF = """\
ClusterName={name}
SlurmctldHost={controller}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={state}/munge/socket
StateSaveLocation={state}/spool/ctl
SlurmdSpoolDir={state}/spool/%n
SlurmctldPidFile={state}/spool/ctl.pid
SlurmdPidFile={state}/spool/%n.pid
SlurmctldLogFile={state}/log/slurmctld.log
SlurmdLogFile={state}/log/%n.log
SlurmctldDebug=info
SlurmdDebug=info
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=none
SwitchType=switch/none
MailProg=/bin/true
ReturnToService=2
InactiveLimit=0
KillWait={kill_wait_s}
MinJobAge=600
MaxJobCount=20000
MessageTimeout=10
SlurmctldTimeout=60
SlurmdTimeout=300
BatchStartTimeout=20
CompleteWait=0
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
DefMemPerCPU={memory_per_cpu_mib}
{gres_types}{nodes}
PartitionName=train Nodes={names} Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
{extra}"""


def write_configuration(state: Path, spec: TestbedSpec, name: str, ports: list[int]) -> None:
    """Write `conf/` (and the stand-in device files that it names) into the state folder.

    Args:
        ports: The controller's port, then one for each node.
    """
    conf = state / "conf"
    gres = parse_gres(spec.gres)
    gres_field = f" Gres={spec.gres}" if gres else ""
    nodes = [
        f"NodeName={node} NodeHostname={node} NodeAddr=127.0.0.1 Port={port} CPUs={spec.cpus} Boards=1 "
        f"SocketsPerBoard=1 CoresPerSocket={spec.cpus} ThreadsPerCore=1 RealMemory={spec.memory_mib}{gres_field} "
        "State=UNKNOWN"
        for node, port in zip(spec.node_names, ports[1:], strict=True)
    ]
    types = ",".join(dict.fromkeys(item.name for item in gres))
    text = _SLURM_CONF.format(
        name="testbed_" + re.sub(r"[^a-z0-9_]", "_", name.lower()),
        controller=CONTROLLER,
        controller_port=ports[0],
        user=pwd.getpwuid(os.getuid()).pw_name,
        state=state,
        kill_wait_s=spec.kill_wait_s,
        memory_per_cpu_mib=spec.memory_mib // spec.cpus,
        gres_types=f"GresTypes={types}\n" if types else "",
        nodes="\n".join(nodes),
        names=",".join(spec.node_names),
        extra="".join(f"{line}\n" for line in spec.extra_conf),
    )
    _write(conf / "slurm.conf", text)
    _write(conf / "gres.conf", "".join(_gres_lines(state / "dev", spec)))
    hosts = Path("/etc/hosts").read_text() if Path("/etc/hosts").exists() else ""
    names = " ".join([CONTROLLER, LOGIN, *spec.node_names])
    _write(conf / "hosts", f"{hosts}\n127.0.0.1 {names}\n")


def _write(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o644)  # whatever the umask is: every user's commands read it


def _gres_lines(devices: Path, spec: TestbedSpec) -> list[str]:
    lines = []
    next_device: dict[str, int] = {}
    for item in parse_gres(spec.gres):
        first = next_device.get(item.name, 0)
        next_device[item.name] = first + item.count
        numbers = range(first, first + item.count)
        real = [Path(f"/dev/nvidia{number}") for number in numbers]
        if item.name == "gpu" and all(path.is_char_device() for path in real):
            stem = "/dev/nvidia"
        else:
            stem = f"{devices}/{item.name}"
            for number in numbers:
                Path(f"{stem}{number}").symlink_to("/dev/null")  # slurmd wants a device, and only looks at it
        span = f"[{first}-{numbers[-1]}]" if item.count > 1 else str(first)
        kind = f"Type={item.kind} " if item.kind else ""
        lines.append(f"NodeName={','.join(spec.node_names)} Name={item.name} {kind}File={stem}{span}\n")
    return lines
