"""Metrics in the text format that Prometheus reads. The numbers are collected elsewhere (`backend.metrics`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.registry import Collector

from backend.metrics import Distribution, Family

MEDIA_TYPE = CONTENT_TYPE_PLAIN_0_0_4
PREFIX = "suri_"


class _Given(Collector):
    """What was collected a moment ago, as the library wants it."""

    def __init__(self, families: Sequence[Family | Distribution]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        for family in self._families:
            yield _histogram(family) if isinstance(family, Distribution) else _values(family)


def text(families: Iterable[Family | Distribution]) -> bytes:
    """The body of an answer to a scrape."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Given(list(families)))
    return generate_latest(registry)


def _values(family: Family) -> Metric:
    kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    metric = kind(PREFIX + family.name, family.help, labels=family.labels)
    for labels, value in family.values.items():
        metric.add_metric([label or "" for label in labels], value)
    return metric


def _histogram(family: Distribution) -> Metric:
    ends = [*(str(end) for end in family.ends), "+Inf"]
    metric = HistogramMetricFamily(PREFIX + family.name, family.help)
    metric.add_metric([], list(zip(ends, family.counts, strict=True)), sum_value=family.sum)
    return metric
