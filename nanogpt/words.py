"""Numbers as people read them."""


def short(n: float) -> str:
    """1.23T, 45.6B, 789M, 12.3k, 45"""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.3g}{letter}"
    return f"{n:.0f}"


def duration(seconds: float) -> str:
    """3:07, 2:03:07, 5d 02:03"""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    return f"{days}d {h:02}:{m:02}" if days else f"{h}:{m:02}:{s:02}" if h else f"{m}:{s:02}"
