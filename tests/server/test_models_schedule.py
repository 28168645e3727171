from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st
from interpose_server.models.schedule import DAY_MIN, DAYS, Window, scheduled
from interpose_server.models.spec import ModelSpec
from pydantic import ValidationError

MONDAY = datetime(2026, 11, 23, tzinfo=UTC)


def at(day: str, hour: int, minute: int = 0) -> datetime:
    return MONDAY + timedelta(days=DAYS.index(day), hours=hour, minutes=minute)


@pytest.mark.parametrize(
    "text, within, without",
    [
        ("mon-fri 08:00-20:00", [at("mon", 8), at("fri", 19, 59)], [at("mon", 7, 59), at("mon", 20), at("sat", 9)]),
        ("sat,sun 10:00-14:30", [at("sat", 10), at("sun", 14, 29)], [at("sun", 14, 30), at("mon", 11)]),
        ("fri-mon 00:00-24:00", [at("fri", 0), at("mon", 23, 59)], [at("tue", 0), at("thu", 23, 59)]),
        ("fri 22:00-06:00", [at("fri", 23), at("sat", 5, 59)], [at("fri", 5), at("sat", 6), at("sat", 23)]),
        ("sun 22:00-06:00", [at("sun", 22), at("mon", 0)], [at("mon", 6), at("sun", 1)]),
        ("daily 00:00-24:00", [at("wed", 0), at("sun", 23, 59)], []),
    ],
)
def test_windows(text: str, within: list[datetime], without: list[datetime]) -> None:
    window = Window.parse(text)
    assert all(map(window.holds, within)) and not any(map(window.holds, without))
    assert all(scheduled(("mon 03:00-03:01", text), moment.timestamp()) for moment in within)


def test_times_are_utc() -> None:
    tokyo = datetime(2026, 11, 23, 8, 30, tzinfo=timezone(timedelta(hours=9)))
    assert not Window.parse("mon 08:00-09:00").holds(tokyo) and Window.parse("sun 23:00-24:00").holds(tokyo)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "mon",
            "mon 8:00-20:00",
            "mon 08:00-25:00",
            "mon 08:00-20:60",
            "mon 08:00 - 20:00",
            "Mon 08:00-20:00",
        ),
        *("mon 24:00-08:00", "mon 08:00-24:01", "mon 08:00-08:00", "mo 08:00-09:00", "mon- 08:00-09:00"),
        *(
            "mon,,tue 08:00-09:00",
            "mon-tue-wed 08:00-09:00",
            " mon 08:00-09:00",
            "mon 08:00-09:00 ",
            "-fri 08:00-09:00",
        ),
    ],
)
def test_what_is_no_time_of_the_week_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Window.parse(text)
    with pytest.raises(ValidationError):
        ModelSpec(name="tiny", schedule=(text,))


@given(st.sets(st.integers(0, 6), min_size=1), st.integers(0, DAY_MIN - 1), st.integers(0, DAY_MIN))
def test_a_window_holds_for_its_length_each_of_its_days(days: set[int], begin: int, end: int) -> None:
    if begin == end:
        return
    names = ",".join(DAYS[day] for day in sorted(days))
    text = f"{names} {begin // 60:02}:{begin % 60:02}-{end // 60:02}:{end % 60:02}"
    window = Window.parse(text)
    minutes = sum(window.holds(MONDAY + timedelta(minutes=minute)) for minute in range(7 * DAY_MIN))
    assert minutes == len(days) * ((end - begin) % DAY_MIN or DAY_MIN)
