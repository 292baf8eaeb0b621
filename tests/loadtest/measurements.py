"""Records as a load test leaves them, made by hand, and reports of them."""

from loadtest.cells import group_cells
from loadtest.conclusions import Facts, SpeedGate, build_report
from loadtest.loads import ClosedLoop
from loadtest.records import BlockRecord, Measurements, RequestRecord, ResourceSample
from loadtest.settings import LoadTestSettings

ONE = ClosedLoop(1)
FACTS = Facts({}, {})
SETTINGS = LoadTestSettings(
    "a", {"pruned": "b"}, loads=(ONE,), pairs=1, interleaved=False, requests_per_load=2
)


def record(
    arm="dense",
    pair=0,
    load="concurrency_1",
    ttft=0.5,
    tpot=0.1,
    tokens=5,
    sent=100.0,
    scheduled=None,
    error=None,
):
    times = tuple(sent + ttft + tpot * index for index in range(tokens))
    return RequestRecord(
        arm=arm,
        pair=pair,
        load=load,
        request="r",
        prompt_tokens=3,
        requested_tokens=tokens,
        scheduled_s=scheduled,
        sent_s=sent,
        ended_s=times[-1],
        chunk_times_s=times,
        chunk_tokens=tuple(range(1, tokens + 1)),
        completion_tokens=tokens,
        error=error,
    )


def measured(records, **of_all_blocks):
    """With the record of each block that they are of."""
    known = {"client_cpu": 0.1, "server_tokens": None} | of_all_blocks
    places = dict.fromkeys((one.arm, one.pair, one.load) for one in records)
    blocks = [BlockRecord(arm=arm, pair=pair, load=load, **known) for arm, pair, load in places]
    return Measurements(tuple(records), tuple(blocks))


def cells_of(records):
    return group_cells(Measurements(tuple(records)))


def report_of(records, settings=SETTINGS, required=1.0, **of_all_blocks):
    return build_report(measured(records, **of_all_blocks), settings, SpeedGate(required), FACTS)


def sample(time_s, pair=0, cpu=0.5, gpus=()):
    return ResourceSample(
        arm="dense", pair=pair, load=ONE.name, time_s=time_s, cpu=cpu, memory_bytes=9, gpus=gpus
    )
