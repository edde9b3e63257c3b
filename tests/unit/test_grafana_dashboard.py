"""The dashboard for Grafana asks for the metrics that there are, and for all of them."""

import json
import re
from pathlib import Path

from ray_trainer.cluster.telemetry import METRICS

DASHBOARD = json.loads((Path(__file__).parents[2] / "cluster" / "grafana-dashboard.json").read_text())
EXPORTED = {f"ray_{name}" for name in METRICS}  # the names that Ray gives them


def queries():
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def asked_for(query):
    return set(re.findall(r"\bray_\w+", query))


def test_queries_name_exactly_the_exported_metrics():
    assert set().union(*map(asked_for, queries())) == EXPORTED


def test_every_query_is_of_the_chosen_run_and_counts_no_worker_twice():
    for query in queries():
        assert '{run=~"$run"}' in query
        assert "max by (run) (" in query


def test_choice_of_runs_comes_from_a_metric_that_there_is():
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}

    assert asked_for(variables["run"]["query"]["query"]) <= EXPORTED
    assert variables["datasource"]["query"] == "prometheus"


def test_panels_have_numbers_of_their_own_and_do_not_overlap():
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells, panel["title"]
        assert all(x < 24 for x, _ in cells)
        taken |= cells
