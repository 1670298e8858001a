"""The HTML page of the report."""

from __future__ import annotations

import json

from report_files import NOW, Page, WriteRun, record, rendered, start

from ds_gpt2.common.formatting import clock
from ds_gpt2.tools.report import page
from ds_gpt2.tools.report.charts import Chart
from ds_gpt2.tools.report.page import RunSection, render
from ds_gpt2.tools.report.run import load_run
from ds_gpt2.tools.report.summary import summarize


def test_sentence_starts_with_losses_that_are_not_finite(write_run: WriteRun) -> None:
    records = [record(step) for step in range(1, 11)]
    records[4] |= {"val/loss": 3.5}
    records[9] |= {"train/loss": None, "val/loss": None}
    sentence = page.sentence(summarize(load_run(write_run(records)), NOW))
    newest = (
        "The newest training loss is NaN or infinite (step 10), the newest validation loss is NaN or infinite (step 10)"
    )
    assert f". {newest}, loss " in sentence and "validation 3.5000" in sentence


def test_text_from_files_is_escaped(write_run: WriteRun) -> None:
    hostile = "</pre></script><script>alert(1)</script><img src=http://hostile.example/x onerror=alert(2)>"
    directory = write_run(
        [record(1, **{"samples/0": hostile, "samples/7": hostile})], [{**start(NOW, 0), "git_commit": "<i>"}]
    )
    (directory / "NOTES.md").write_text(hostile)
    line = {"time": NOW, "step": 1, "kind": hostile, "text": hostile}
    (directory / "journal.jsonl").write_text(json.dumps(line) + "\n")
    found = rendered(directory)
    assert found.text.count(hostile) == 5
    assert "Say <b>" in found.text
    assert len(found.scripts) == 3
    assert {tag for tag, _ in found.tags} & {"img", "i", "b"} == set()
    assert not any("onerror" in attributes for _, attributes in found.tags)


def test_name_of_a_curve_cannot_end_the_script(write_run: WriteRun) -> None:
    run = load_run(write_run([]))
    name = "</script><b>bold</b>"
    found = Page(render([RunSection(run, summarize(run, NOW))], [Chart(name, [{"name": name}])], NOW))
    assert list(found.traces(0)) == [name]
    assert "b" not in {tag for tag, _ in found.tags}


def test_page_loads_nothing_and_forbids_network_access(write_run: WriteRun) -> None:
    found = rendered(write_run([record(step) for step in range(1, 41)]))
    assert not any({"src", "href", "srcset", "action"} & set(attributes) for _, attributes in found.tags)
    assert {tag for tag, _ in found.tags} & {"link", "iframe", "object", "base"} == set()
    policies = [each["content"] for tag, each in found.tags if each.get("http-equiv") == "Content-Security-Policy"]
    assert policies == [page._POLICY]
    assert page._POLICY.startswith("default-src 'none';") and "http" not in page._POLICY and "*" not in page._POLICY
    assert any(tag == "meta" and each.get("name") == "viewport" for tag, each in found.tags)
    drawn = {each["id"] for tag, each in found.tags if each.get("class") == "chart"}
    assert drawn == set(found.figures)


def test_sections_that_are_not_configured_are_left_out(write_run: WriteRun) -> None:
    """A section without "no data yet" if the run never has such data."""
    directory = write_run([record(step) for step in range(1, 41)])
    config = directory / "config.yaml"
    assert "HellaSwag" not in rendered(directory).text.replace("hellaswag", "")
    assert "Samples" in rendered(directory).text
    text = config.read_text()
    config.write_text(text.replace("samples: {", "samples: {every: 0, "))
    found = rendered(directory)
    assert "Samples" not in found.text and "Notes" not in found.text
    config.write_text(text + "hellaswag: {every: 10}\n")
    assert "HellaSwagno data yet" in "".join(rendered(directory).text.split("\n"))
    config.write_text(text)
    other = write_run([record(step, **{"hellaswag/acc_norm": 0.3}) for step in range(1, 41)], name="other")
    assert "HellaSwag" in rendered(directory, other).text  # one of the runs has it


def test_page_of_a_run_without_records(write_run: WriteRun) -> None:
    found = rendered(write_run([]))
    assert found.figures == {}
    assert "No data yet: nothing is recorded." in found.text
    assert found.text.count("no data yet") >= 7


def test_spread_returns_the_first_the_last_and_some_between() -> None:
    assert page._spread(list(range(1000, 0, -10)), 5) == [1000, 750, 500, 260, 10]
    assert page._spread([3, 2], 5) == [3, 2]


def test_hosts_of_a_run_on_several_machines_are_shown(write_run: WriteRun) -> None:
    directory = write_run([record(1)])
    assert ">hosts<" not in rendered(directory).text
    hosts = {"restart": False, "hosts": {"node1": 2, "node2": 2}}
    events = [
        {"time": NOW - 50, "kind": "launch", "text": "starting", "facts": hosts},
        {"time": NOW - 40, "kind": "host_lost", "text": "lost", "facts": {"host": "node2", "reason": "no answer"}},
    ]
    (directory / "journal.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    text = f"2 ranks on 1 host: node1 (2); node2 is away since {clock(NOW - 40)}"
    assert text in rendered(directory).text
    assert [host.name for host in summarize(load_run(directory), NOW).hosts] == ["node1", "node2"]
