"""Traces: full schema checks, malformed rows by line, wrong units and time zones."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hydro_sim.traces import (
    ColumnMapping,
    check_plausible,
    generate_trace,
    load_helios,
    load_mapped,
    load_philly,
    load_sacct,
)
from hydro_sim.traces.sacct import count_gpus, time_limit_s
from hydro_slurm.errors import TraceError

PHILLY = "timestamp,duration,num_gpus,gpu_time,cluster\n"
SACCT = "JobID|JobName|User|Partition|State|Submit|Start|End|ElapsedRaw|Timelimit|AllocTRES\n"


def write(tmp_path: Path, text: str, name: str = "trace.csv") -> Path:
    path = tmp_path / name
    path.write_text(text)
    return path


def sacct_row(
    job: int, submit: str, start: str, end: str, elapsed: int, gpus: int = 8, limit: str = "1-00:00:00"
) -> str:
    tres = f"billing=8,cpu=64,gres/gpu:a100={gpus},gres/gpu={gpus},mem=1000G,node=1"
    return f"{job}|train|ada|gpu|COMPLETED|{submit}|{start}|{end}|{elapsed}|{limit}|{tres}\n"


def test_philly_rows_become_jobs_and_bad_rows_are_named_by_line(tmp_path: Path) -> None:
    good = "2017-10-09 07:01:55,100.0,2,200.0,vc1\n"
    bad = ["soon,1.0,1,1.0,vc1\n", "2017-10-09 07:01:55,100.0,2,300.0,vc1\n", "2017-10-09 07:01:55,5.0,1\n"]
    trace = load_philly(write(tmp_path, PHILLY + good * 20 + "".join(bad) + "2017-10-09 07:00:00,0,1,0,vc1\n"))
    assert len(trace.jobs) == 20
    assert (trace.jobs[0].num_devices, trace.jobs[0].duration_s, trace.jobs[0].partition) == (2, 100.0, "vc1")
    assert [line for line, _ in trace.bad_rows] == [22, 23, 24]
    assert trace.left_out == {"ran for no time": 1}
    text = "\n".join(trace.describe())
    assert "malformed: 3 rows" in text
    assert "line 22: timestamp: got 'soon', needed a time like" in text
    assert "line 23: gpu_time 300 is not duration 100 times num_gpus 2" in text
    assert "line 24: another number of fields" in text


def test_another_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="the header lacks timestamp, duration"):
        load_philly(write(tmp_path, "a,b\n1,2\n"))
    with pytest.raises(TraceError, match=r"2 of 2 rows are malformed .* line 2: timestamp"):
        load_philly(write(tmp_path, PHILLY + "x,1,1,1,v\n" * 2))
    with pytest.raises(TraceError, match=r"cannot read the trace .*none\.csv: No such file"):
        load_philly(tmp_path / "none.csv")


def test_phillys_own_log_is_read(tmp_path: Path) -> None:
    attempt = {
        "start_time": "2017-10-09 07:02:00",
        "end_time": "2017-10-09 08:02:00",
        "detail": [{"ip": "m1", "gpus": ["g0", "g1"]}, {"ip": "m2", "gpus": ["g0"]}],
    }
    job = {"jobid": "j", "user": "u", "vc": "v", "submitted_time": "2017-10-09 07:01:55", "attempts": [attempt]}
    never = {**job, "attempts": []}
    trace = load_philly(write(tmp_path, json.dumps([job, never, {"jobid": 3}]), "cluster_job_log"))
    assert [(found.num_devices, found.duration_s) for found in trace.jobs] == [(3, 3600.0)]
    assert trace.left_out == {"never ran to an end": 1}
    assert [line for line, _ in trace.bad_rows] == [3]


def test_helios_is_read_in_both_forms(tmp_path: Path) -> None:
    sample = "u_id,user,gpu_num,cpu_num,node_num,interval,run_time,wall_time,new_status\n"
    trace = load_helios(
        write(tmp_path, sample + "0,1,1,1,1,0,84,0,Pass\n1,1,0,1,1,90,5,0,Pass\n2,1,8,1,1,10,87,0,Pass\n")
    )
    assert [job.submit_s - trace.jobs[0].submit_s for job in trace.jobs] == [0.0, 100.0]
    assert trace.left_out == {"asks for no device": 1}
    header = "job_id,user,vc,jobname,gpu_num,cpu_num,node_num,state,submit_time,start_time,end_time,duration,queue\n"
    row = "1,u,vc1,j,8,8,1,COMPLETED,2020-04-01 00:00:00,2020-04-01 00:01:00,2020-04-01 01:01:00,3600,60\n"
    trace = load_helios(write(tmp_path, header + row, "cluster_log.csv"))
    assert trace.jobs[0].waited_s == 60.0


def test_sacct_output_is_read_with_steps_arrays_limits_and_typed_gpus(tmp_path: Path) -> None:
    text = SACCT + sacct_row(41, "2026-01-01T00:00:00", "2026-01-01T00:10:00", "2026-01-01T02:10:00", 7200)
    text += "41.batch|batch||||2026-01-01T00:10:00|2026-01-01T00:10:00|2026-01-01T02:10:00|7200||cpu=64\n"
    text += "42|x|ada|gpu|CANCELLED by 7|2026-01-01T00:00:00|None|2026-01-01T02:10:00|0|1:00:00|\n"
    text += "43_7|x|ben|gpu|COMPLETED|2026-01-01T05:00:00|2026-01-01T05:00:00|2026-01-01T06:00:00|3600|UNLIMITED|"
    text += "gres/gpu=1\n"
    text += "44|x|ben|gpu|COMPLETED|2026-01-01T05:00:00|2026-01-01T05:00:00|2026-01-01T06:00:00|3600|01:00:00|cpu=4\n"
    trace = load_sacct(write(tmp_path, text))
    assert [(job.name, job.num_devices, job.limit_s, job.waited_s) for job in trace.jobs] == [
        ("41", 8, 86400.0, 600.0),
        ("43_7", 1, None, 0.0),
    ]
    assert trace.left_out == {"steps of jobs": 1, "never started": 1, "held no GPU": 1}
    zoned = load_sacct(write(tmp_path, text), zone="Asia/Tokyo")
    assert trace.jobs[0].submit_s - zoned.jobs[0].submit_s == 9 * 3600
    with pytest.raises(TraceError, match="there is no time zone called 'Mars/Base'"):
        load_sacct(write(tmp_path, text), zone="Mars/Base")


def test_a_job_name_that_begins_with_a_quotation_mark_takes_no_rows_with_it(tmp_path: Path) -> None:
    """sacct quotes nothing."""
    row = sacct_row(41, "2026-01-01T00:00:00", "2026-01-01T00:10:00", "2026-01-01T02:10:00", 7200)
    odd = row.split("|")
    odd[1] = '"my run'
    trace = load_sacct(write(tmp_path, SACCT + 3 * row + "|".join(odd) + 3 * row))
    assert (len(trace.jobs), trace.bad_rows) == (7, [])


def test_what_sacct_writes_about_gpus_and_limits_is_understood() -> None:
    assert count_gpus("billing=64,gres/gpu:a100=4,gres/gpu=4") == 4
    assert count_gpus("gres/gpu:a100=4,gres/gpu:h100=2") == 6
    assert count_gpus("cpu=4,mem=10G") == 0
    assert time_limit_s("2-01:00:30") == 49 * 3600 + 30
    assert time_limit_s("Partition_Limit") is None


def test_wrong_units_are_caught(tmp_path: Path) -> None:
    rows = "".join(f"2017-10-09 07:01:{i:02d},86400000,1,86400000,v\n" for i in range(30))
    with pytest.raises(TraceError, match="are the durations in milliseconds"):
        check_plausible(load_philly(write(tmp_path, PHILLY + rows)))
    elapsed = sacct_row(1, "2026-01-01T00:00:00", "2026-01-01T00:10:00", "2026-01-01T02:10:00", 7200 * 1000)
    with pytest.raises(TraceError, match="ElapsedRaw 7200000 s is more than End less Start, 7200 s: which unit"):
        load_sacct(write(tmp_path, SACCT + elapsed))
    minutes = "".join(f"2017-10-09 07:{i // 60:02d}:{i % 60:02d},12,1,12,v\n" for i in range(200))
    trace = load_philly(write(tmp_path, PHILLY + minutes))
    check_plausible(trace)
    assert "are the durations in minutes or hours" in trace.warnings[0]
    table = write(tmp_path, "t,n,d\n" + "1700000000000,1,60\n" * 3)
    with pytest.raises(TraceError, match="are they in milliseconds"):
        check_plausible(load_mapped(table, ColumnMapping(submit="t", devices="n", duration="d")))


def test_wrong_time_zones_are_caught(tmp_path: Path) -> None:
    early = "".join(
        sacct_row(i, f"2026-01-01T09:{i:02d}:00", f"2026-01-01T01:{i:02d}:30", f"2026-01-01T02:{i:02d}:30", 3600)
        for i in range(30)
    )
    with pytest.raises(TraceError, match=r"30 of 30 jobs start before they are submitted \(typically by 8\.0 h\)"):
        check_plausible(load_sacct(write(tmp_path, SACCT + early)))
    late = "".join(
        sacct_row(i, f"2026-01-01T01:{i:02d}:00", f"2026-01-01T09:{i:02d}:0{i % 7}", f"2026-01-01T10:{i:02d}:09", 3600)
        for i in range(30)
    )
    trace = load_sacct(write(tmp_path, SACCT + late))
    check_plausible(trace)
    assert "no job starts sooner than 8.0 h after it was submitted" in trace.warnings[0]


def test_any_table_is_read_by_naming_its_columns(tmp_path: Path) -> None:
    path = write(tmp_path, "when;gpus;from;to;who\n2026-01-01T00:00:00;4;2026-01-01T00:00:10;2026-01-01T00:10:10;ada\n")
    mapping = ColumnMapping(submit="when", devices="gpus", start="from", end="to", user="who", delimiter=";")
    (job,) = load_mapped(path, mapping).jobs
    assert (job.num_devices, job.duration_s, job.waited_s, job.user) == (4, 600.0, 10.0, "ada")


def test_generated_traces_are_labelled_and_repeat() -> None:
    first, again = generate_trace(500, 64, seed=1), generate_trace(500, 64, seed=1)
    assert first.jobs == again.jobs != generate_trace(500, 64, seed=2).jobs
    assert first.synthetic
    assert "(synthetic)" in first.describe()[0]
    check_plausible(first)
    work_s = sum(job.duration_s * job.num_devices for job in first.jobs)
    assert work_s / first.span_s / 64 == pytest.approx(0.8, rel=0.2)


@pytest.mark.skipif(not os.environ.get("TRACES"), reason="TRACES does not say where the public traces lie")
def test_public_traces_load_whole() -> None:
    folder = Path(os.environ["TRACES"])
    philly, helios = load_philly(folder / "philly.csv"), load_helios(folder / "helios_15k.csv")
    for trace in (philly, helios):
        check_plausible(trace)
        assert not trace.bad_rows
    assert len(philly.jobs) == 82_247
    assert len(helios.jobs) + helios.left_out.total() == 15_000
