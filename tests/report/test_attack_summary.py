"""The suite's report on synthetic answers: tables, worst case, headline, and the verdict on the suite itself."""

from __future__ import annotations

import json
import shutil

import pytest

from distill_jax.attacks.controls import CONTROLS
from distill_jax.attacks.registry import ATTACKS
from distill_jax.report import render_html, summarise
from distill_jax.report.attack_controls import suite_verdict
from distill_jax.report.attack_summary import summarise_attacks
from distill_jax.report.attack_table import (
    attack_rows,
    attack_text,
    detail_rows,
    heat_map,
    shaded_rows,
    worst_rows,
)
from distill_jax.report.statistics import holm
from tests.report.synthetic import CONFIG, ENVIRONMENT, SETTING, World, write_lines, write_workdir

KIND = "byte"
SIZES = {"samples": 6000, "steps": 800}
CLEAN = {"A1": 0.8, "A2": 0.85, "A3": 0.8, "A5": 0.5, "A7": 0.9}
GUARDED = {"A1": 0.22, "A2": 0.25, "A3": 0.5, "A5": 0.3, "A7": 0.8}
SHAM = {"A3": 0.8, "A5": 0.5}
SWAPPED = {"A7": 0.9}
PERMUTED = dict.fromkeys(("A1", "A2", "A3", "A5", "A7"), 0.18)


def write_cell(world, workdir, arm, attack, rate, *, attack_folder=None, seeds=3):
    folder = workdir / "students" / arm / attack / KIND
    for seed in range(seeds):
        for name, decodings in (("predictions", ("greedy", "sample")), ("validation", ("greedy",))):
            rows = [
                {"budget": 1.0, "decoding": decoding, "problem": problem, "correct": correct}
                for decoding in decodings
                for problem, correct in enumerate(world.answers(rate))
            ]
            write_lines(folder / f"seed{seed}" / f"{name}.jsonl", rows)
    (folder / "knob.json").write_text(
        json.dumps(
            {
                "attack": attack,
                "knob": "default",
                "search": {"scores": {}, "queries": 2.0, "steps": 1.0},
                "queries": 1.0,
                "steps": 1.0,
            }
        )
    )


def write_suite(workdir, *, clean=CLEAN, guarded=GUARDED, sham=SHAM, swapped=SWAPPED, permuted=PERMUTED):
    """A run with the suite's cells as the pipeline would leave them."""
    write_workdir(workdir, kinds=(KIND,))
    world = World(256, 4)
    for arm, rates in {
        "original": clean,
        "undistillable": guarded,
        "sham": sham,
        "swapped": swapped,
        "permuted": permuted,
    }.items():
        for attack, rate in rates.items():
            write_cell(world, workdir, arm, attack, rate)
    write_cell(world, workdir, "gold", "A0b", 0.6)
    base = workdir / "students" / "base" / "none" / KIND / "seed0"
    for more in (1, 2):  # there is one untrained student
        shutil.rmtree(base.with_name(f"seed{more}"))
    rows = [{"decoding": "greedy", "problem": p, "correct": c} for p, c in enumerate(world.answers(0.18))]
    write_lines(base / "predictions.jsonl", rows)
    write_lines(base / "validation.jsonl", rows)
    chosen = [ATTACKS[name] for name in ("A0", "A0b", *clean)]
    suite = {
        "settings": {"clean": "original", "margin": 0.01},
        "arms": ["original", "undistillable"],
        "kinds": [KIND],
        "attacks": {
            entry.id: {
                "name": entry.name,
                "sentence": entry.sentence,
                "access": entry.access,
                "uses_teacher": entry.uses_teacher,
                "view": entry.view,
            }
            for entry in chosen
        },
        "controls": {
            control.id: {
                "name": control.name,
                "sentence": control.sentence,
                "expect": control.expect,
                "arm": control.arm,
                "threshold": control.threshold,
                "attacks": {"P1": ["A3", "A5"], "P2": ["A7"], "P3": list(permuted)}.get(control.id, []),
            }
            for control in CONTROLS
        },
        "shams": {"sham": {"clean": 0.99, "sham": 0.0}, "swapped": {"clean": 0.99, "sham": 0.05}},
        "skipped": {"A6 on original by byte": "no rewriter is given (attack_suite.rewriter)"},
    }
    (workdir / "attacks").mkdir()
    (workdir / "attacks" / "suite.json").write_text(json.dumps(suite))
    return workdir


def change_suite(workdir, **changes):
    path = workdir / "attacks" / "suite.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def judged(workdir, **rates):
    return summarise_attacks(write_suite(workdir, **rates), SIZES, resamples=400)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("sound")
    return workdir, judged(workdir)


def test_without_a_suite_there_is_nothing(tmp_path):
    assert summarise_attacks(write_workdir(tmp_path), SIZES) is None


def test_controls_pass_and_the_verdict_is_valid(sound):
    controls = sound[1]["controls"]
    assert {name: control["verdict"] for name, control in controls.items()} == dict.fromkeys(
        ("P1", "P2", "P3", "P4"), "passed"
    )
    assert sound[1]["verdict"] == "valid"
    assert sound[1]["proofs"][KIND] == {
        "text": {"proven": True, "why": "proven by P1 and P3"},
        "top-k": {"proven": True, "why": "proven by P1, P2 and P3"},
    }


def test_worst_case_grows_with_access(sound):
    text, top_k = sound[1]["worst_case"][KIND]["undistillable"]
    assert (text["access"], text["attack"], text["attacks"]) == ("text", "A3", ["A1", "A2", "A3", "A5"])
    assert (top_k["access"], top_k["attack"]) == ("top-k", "A7")
    assert text["recovered_gap"]["mean"] == pytest.approx((0.5 - 0.18) / (0.8 - 0.18), abs=0.02)
    # the best text attack is A3 here and A2 on the clean teacher
    assert text["gain_denied"]["mean"] == pytest.approx(1 - (0.5 - 0.18) / (0.85 - 0.18), abs=0.02)


def test_headline_says_access_budget_attacks_interval_and_retention(sound):
    text, top_k = sound[1]["headlines"]
    # 1 + 2 times the run's 6000 texts, 1 + 1 times its 800 steps
    assert text.startswith(
        "under text access, a budget of up to 18,000 texts and 1,600 training steps for each attack"
    )
    for part in ("A1, A2, A3 and A5", "worst-case recovered gap of byte students", "95 % interval"):
        assert part in text
    assert "teacher retention 0.9" in text and "A7 default" in top_k
    assert not any(
        "undistillable" in sentence.replace("undistillable mode", "") for sentence in (text, top_k)
    )


def test_cells_have_every_number(sound):
    cell = sound[1]["cells"][KIND]["A3"]["undistillable"]
    assert cell["gain"]["mean"] == pytest.approx(0.32, abs=0.01)
    assert cell["relative_collapse"]["mean"] == pytest.approx(1 - 0.5 / 0.8, abs=0.01)
    assert cell["absolute_gap"]["mean"] == pytest.approx(0.32 / (0.99 - 0.18), abs=0.02)
    assert cell["harm_below_base"]["count"] == 0 and cell["gain_p_holm"] >= cell["gain_p"]
    assert sound[1]["minimum_detectable_effect"] > 0.05
    assert sound[1]["retention"]["undistillable"]["ratio"]["mean"] == pytest.approx(0.985 / 0.99, abs=0.01)
    cost = sound[1]["cost"][KIND]["undistillable"]
    assert cost["multiplier"]["mean"] is None and cost["at_least"] > 2


@pytest.mark.parametrize(
    ("rates", "failed"),
    [
        ({"sham": {"A3": 0.4, "A5": 0.3}}, "P1"),
        ({"swapped": {"A7": 0.3}}, "P2"),
        ({"permuted": {**PERMUTED, "A5": 0.45}}, "P3"),
        ({"guarded": {**GUARDED, "A7": 0.2}, "clean": {**CLEAN, "A7": 0.9}}, None),
    ],
)
def test_a_failed_control_makes_the_evaluation_invalid(tmp_path, rates, failed):
    attacks = judged(tmp_path, **rates)
    verdicts = {name for name, control in attacks["controls"].items() if control["verdict"] == "failed"}
    assert verdicts == ({failed} if failed else set())
    assert (attacks["verdict"] == "invalid") == bool(failed)
    assert bool(attacks["headlines"]) != bool(failed)
    assert ("Worst case of each access" in attack_text(attacks)) != bool(failed)


def test_more_access_that_is_worse_on_test_problems_is_not_monotone(tmp_path):
    """The attack that validation problems call the best falls far behind on test problems."""
    workdir = write_suite(tmp_path)
    world = World(256, 4)
    for seed in range(3):
        rows = [
            {"budget": 1.0, "decoding": "greedy", "problem": problem, "correct": correct}
            for problem, correct in enumerate(world.answers(0.2))
        ]
        write_lines(workdir / "students/undistillable/A7" / KIND / f"seed{seed}" / "predictions.jsonl", rows)
    attacks = summarise_attacks(workdir, SIZES, resamples=400)
    assert (
        attacks["controls"]["P4"]["verdict"] == "failed"
        and "A7 after A3" in attacks["controls"]["P4"]["finding"]
    )


def test_without_a_clean_gain_the_controls_cannot_be_judged(tmp_path):
    attacks = judged(tmp_path, clean=dict.fromkeys(CLEAN, 0.18), sham=dict.fromkeys(SHAM, 0.18))
    assert attacks["controls"]["P1"]["verdict"] == "not judged" and attacks["verdict"] == "not validated"
    assert attacks["worst_case"][KIND]["undistillable"] == []


def test_table_and_text(sound):
    headers, rows = attack_rows(sound[1], KIND)
    assert headers[2:] == ["original, accuracy", "undistillable mode"]
    assert [row[0].split()[0] for row in rows] == ["A0", "A0b", "A1", "A2", "A3", "A5", "A7"]
    assert all(len(row) == len(headers) for row in rows)
    heat = heat_map(sound[1], KIND)
    assert heat["A7"]["undistillable"] > heat["A1"]["undistillable"] >= 0.0
    shaded = dict((row[0][0].split()[0], row) for row in shaded_rows(sound[1], KIND)[1])
    assert shaded["A7"][3][1] == heat["A7"]["undistillable"] and shaded["A7"][2][1] is None
    assert [text for text, _ in shaded["A7"]] == rows[-1]
    text = attack_text(sound[1])
    detail_headers, details = detail_rows(sound[1], KIND)
    found = {(row[0], row[1]): dict(zip(detail_headers, row, strict=True)) for row in details}
    cell = sound[1]["cells"][KIND]["A3"]["undistillable"]
    shown = found["A3", "undistillable mode"]
    assert shown["p (Holm)"] == f"{cell['gain_p_holm']:.2g}" and shown["seeds below untrained"] == "0 of 3"
    assert shown["collapse"].startswith(f"{cell['relative_collapse']['mean']:.2f} [")
    assert shown["absolute gap"].startswith(f"{cell['absolute_gap']['mean']:.2f} [")
    denied = sound[1]["worst_case"][KIND]["undistillable"][0]["gain_denied"]["mean"]
    assert worst_rows(sound[1])[1][0][-1].startswith(f"{denied:.2f} [")
    for part in (
        "gain denied",
        "p (Holm)",
        "told apart (80 % power)",
        "top-k access: proven by P1, P2 and P3",
    ):
        assert part in text
    assert "P1 sham defence" in text and "not run" in text and "more than" in text


def test_an_attack_that_hardly_works_on_the_clean_teacher_is_no_worst_case(tmp_path):
    """A5 gains 6 points of a possible 67 on the clean teacher, and as many on the guarded one: 1 times nothing."""
    rates = {"clean": CLEAN | {"A5": 0.24}, "guarded": GUARDED | {"A5": 0.24}, "sham": {"A3": 0.8}}
    attacks = judged(tmp_path, **rates)
    level = attacks["worst_case"][KIND]["undistillable"][0]
    assert (level["access"], level["attack"]) == ("text", "A3")
    assert "A5" not in level["attacks"] and level["not_comparable"] == ["A5"]
    (headline,) = [line for line in attacks["headlines"] if "'undistillable" in line and "under text" in line]
    assert "attacks A1, A2 and A3, the worst-case" in headline
    assert headline.endswith("the clean teacher's students gain nothing clear by it: A5.")


@pytest.mark.parametrize("broken", [False, True])
def test_page(tmp_path, broken):
    workdir = write_suite(tmp_path, **({"sham": {"A3": 0.2, "A5": 0.2}} if broken else {}))
    summary = summarise(workdir, CONFIG, ENVIRONMENT, SETTING, resamples=200)
    before = render_html(summary, [], {})
    assert "holds one attack" in before and "more numbers of the same cells" not in before
    summary["attacks"] = summarise_attacks(workdir, summary["setting"], resamples=200)
    page = render_html(summary, [], {})
    assert "more numbers of the same cells" in page and ("worst case of each access" in page) is not broken
    assert page.count('id="attacks"') == 1 and "holds one attack" not in page
    assert ("worst-case recovered gap" in page) is not broken
    assert ('<p class="alarm">THE EVALUATION IS INVALID' in page) is broken
    json.dumps(summary, allow_nan=False)


def test_an_access_that_no_control_has_proven_is_provisional_and_said_so(tmp_path):
    """P2 could not be judged: the text attacks are proven by P1 and P3, the one that reads distributions is not."""
    attacks = judged(tmp_path, swapped={})
    assert attacks["controls"]["P2"]["verdict"] == "not judged" and attacks["verdict"] == "not validated"
    proofs = attacks["proofs"][KIND]
    assert proofs["text"] == {"proven": True, "why": "proven by P1 and P3"}
    assert not proofs["top-k"]["proven"] and "no control covers" in proofs["top-k"]["why"]
    text, top_k = attacks["headlines"]
    assert text.startswith("under text access")
    assert top_k.startswith("Not validated by the positive controls: under top-k access")
    assert "text access: proven by" in attack_text(attacks)


def test_controls_of_an_earlier_start_do_not_prove_a_later_attack(tmp_path):
    """A7 came when the controls were off: it stands in no control, and its access is not proven."""
    workdir = write_suite(tmp_path, swapped={})
    controls = json.loads((workdir / "attacks" / "suite.json").read_text())["controls"]
    controls["P2"]["attacks"] = []
    change_suite(workdir, controls=controls)
    attacks = summarise_attacks(workdir, SIZES, resamples=400)
    assert attacks["verdict"] == "not validated" and attacks["proofs"][KIND]["text"]["proven"]


def test_a_sham_whose_texts_stay_right_proves_nothing(tmp_path):
    workdir = write_suite(tmp_path)
    change_suite(workdir, shams={"sham": {"clean": 0.99, "sham": 0.98}})
    attacks = summarise_attacks(workdir, SIZES, resamples=400)
    control = attacks["controls"]["P1"]
    assert control["verdict"] == "not judged" and attacks["verdict"] == "not validated"
    assert "hides nothing in this task: 98.0 % of its texts still count as right" in control["finding"]
    assert attacks["proofs"][KIND]["text"]["why"] == "not proven (P1 not judged)"


def test_a_control_is_judged_by_the_attack_that_validation_problems_choose(tmp_path):
    """A5 recovers all on test problems, but an attacker who looks at validation problems would have taken A3."""
    workdir = write_suite(tmp_path, sham={"A3": 0.3, "A5": 0.5})
    for seed in range(3):
        folder = workdir / "students/sham/A5" / KIND / f"seed{seed}"
        rows = [
            {"budget": 1.0, "decoding": "greedy", "problem": problem, "correct": 0} for problem in range(256)
        ]
        write_lines(folder / "validation.jsonl", rows)
    control = summarise_attacks(workdir, SIZES, resamples=400)["controls"]["P1"]
    assert control["verdict"] == "failed" and "(A3)" in control["finding"]


def test_format_and_the_frequent_answer_are_no_leak(tmp_path):
    """Four answers, one of which is right in 45 % of the problems: a teacher without information teaches to say it."""
    workdir = write_suite(tmp_path, permuted={**PERMUTED, "A1": 0.45})
    assert summarise_attacks(workdir, SIZES, resamples=400)["controls"]["P3"]["verdict"] == "failed"
    rows = [
        {"decoding": "greedy", "problem": problem, "correct": int(problem % 20 < 9)} for problem in range(256)
    ]
    write_lines(workdir / "attacks" / "constant.jsonl", rows)
    attacks = summarise_attacks(workdir, SIZES, resamples=400)
    control = attacks["controls"]["P3"]
    assert control["verdict"] == "passed" and "more than the most frequent answer" in control["finding"]
    assert set(attacks["cells"][KIND]["A0"]) == {"base"}


def test_one_weak_comparison_of_many_is_no_failure():
    """P4 with Holm: what is below .025 alone is not among ten."""
    assert holm({"a": 0.01})["a"] < 0.025 < holm({"a": 0.01, **{str(i): 0.5 for i in range(9)}})["a"]


@pytest.mark.parametrize(
    ("failed", "proven", "verdict"),
    [
        (False, (True, True), "valid"),
        (False, (True, False), "not validated"),
        (False, (), "not validated"),
        (True, (True, True), "invalid"),
    ],
)
def test_what_is_not_proven_is_not_valid(failed, proven, verdict):
    controls = {"P1": {"verdict": "failed" if failed else "passed"}}
    proofs = {"byte": {str(place): {"proven": value} for place, value in enumerate(proven)}}
    assert suite_verdict(controls, proofs) == verdict
