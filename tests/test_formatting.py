"""Numbers, sizes and lists of layers as reports print them."""

import pytest

from pilon_compress.report import formatting


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.5, "0.500"),
        (0.0312749, "0.0313"),
        (43.2149, "43.2"),
        (999.4, "999"),
        (999.7, "1,000"),
        (1234567.8, "1,234,568"),
        (7077888, "7,077,888"),
        (9.9999e-2, "0.100"),
        (9.996, "10.0"),
        (0.99987, "0.9999"),
        (1.0004, "1.0004"),
        (1.0, "1.00"),
        (1.0 - 1e-12, "1.00"),
        (4.4412e-4, "0.000444"),
        (3.2149e-5, "3.21e-5"),
        (0.0, "0"),
        (-0.25, "-0.250"),
        (None, "–"),
        (float("inf"), "not finite"),
    ],
)
def test_numbers_read_like_a_person_wrote_them(value: float | None, text: str) -> None:
    assert formatting.number(value) == text


def test_counts_sizes_and_layer_lists_are_short() -> None:
    assert [formatting.short_count(n) for n in (0, 950, 12_345, 999_499, 999_600, 7_077_888, 1_235_814_400)] == [
        "0",
        "950",
        "12.3 K",
        "999 K",
        "1,000 K",
        "7.08 M",
        "1.24 B",
    ]
    assert formatting.mib(14_155_776) == "13.5 MiB"
    assert formatting.mib(2_471_628_800) == "2,357 MiB"
    assert formatting.layer_list([5, 0, 2, 1]) == "0–2, 5"
