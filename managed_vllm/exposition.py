"""What several servers tell Prometheus, as one text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def merged(texts: Iterable[tuple[Mapping[str, str], str]]) -> list[Metric]:
    """The same metric of several servers as one family; each sample gets its server's labels beside its own.

    Raises:
        ValueError: one is not in Prometheus' text format.
    """
    families: dict[str, Metric] = {}
    for labels, text in texts:
        for family in text_string_to_metric_families(text):
            into = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                into.add_sample(sample.name, {**sample.labels, **labels}, sample.value)
    return list(families.values())


def exposed(families: Iterable[Metric]) -> bytes:
    """In Prometheus' text format (`CONTENT_TYPE`)."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected(families))
    return generate_latest(registry)


class _Collected:
    """A collector of prometheus_client's."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
