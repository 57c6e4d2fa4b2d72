"""Records in memory."""

from curvature_callbacks import MemorySink, Record


def test_records_are_kept_in_order() -> None:
    sink = MemorySink()
    first, second, third = (Record(step=step, measurement="m") for step in range(3))
    sink.write([first, second])
    sink.write([])
    sink.write([third])
    assert [record.step for record in sink.records] == [0, 1, 2]
    assert sink.records[0] is first


def test_sinks_do_not_share_records() -> None:
    used, unused = MemorySink(), MemorySink()
    used.write([Record(step=0, measurement="m")])
    assert unused.records == []
