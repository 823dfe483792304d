"""A distribution over languages from the numbers of their speakers."""

import subprocess
import sys

import pytest

from data_pipelines.speakers import distribution, read_table, speakers
from llmzoo_jax.errors import InputError

HEAD = (
    "bcp_47_code\tenglish_name\testimated_number_of_speakers\tmacrolanguage_bcp_47_code"
    "\tdeprecated_bcp_47_code"
)
ROWS = (
    "en\tEnglish\t1000\t\t",
    "zh\tChinese\t900\t\t",
    "cmn\tMandarin\t900\tzh\t",
    "yue\tYue\t100\tzh\t",
    "he\tHebrew\t10\t\tiw",
    "ms\tMalay\t30\t\t",
    "id\tIndonesian\t170\tms\tin",
    "aac\tAri\t\t\t",
)


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "languages.tsv"
    path.write_text("\n".join([HEAD, *ROWS]) + "\n", encoding="utf-8")
    return str(path)


def test_shares_are_in_proportion_to_speakers(table):
    assert distribution(table, ["en", "he"]) == pytest.approx({"en": 1000 / 1010, "he": 10 / 1010})


def test_alpha_lifts_small_languages_and_0_makes_all_equal(table):
    root = distribution(table, ["en", "he"], alpha=0.5)
    assert root["en"] / root["he"] == pytest.approx(10)
    assert distribution(table, ["en", "he"], alpha=0) == pytest.approx({"en": 0.5, "he": 0.5})


def test_floor_and_cap_hold_and_the_rest_keeps_its_proportion(table):
    shares = distribution(table, ["en", "zh", "id", "he"], floor=0.1, cap=0.4)
    assert shares == pytest.approx({"en": 0.4, "zh": 0.4, "id": 0.1, "he": 0.1})
    shares = distribution(table, ["en", "zh", "id", "he"], floor=0.1)
    assert shares["he"] == shares["id"] == pytest.approx(0.1)
    assert shares["en"] / shares["zh"] == pytest.approx(1000 / 900)


def test_languages_that_the_table_lacks_are_all_named(table):
    with pytest.raises(InputError, match=r"no language tlh, und and no number of speakers for aac"):
        distribution(table, ["en", "tlh", "und", "aac"])


def test_speakers_are_counted_once(table):
    counts = speakers(read_table(table))
    assert counts == {"en": 1000, "zh": 900, "he": 10, "ms": 30, "id": 170}  # id: counted apart
    assert speakers(read_table(table), ["zh", "yue"]) == {"zh": 800, "yue": 100}
    assert speakers(read_table(table), ["yue"]) == {"yue": 100}
    with pytest.raises(InputError, match="zh has no speakers but those of cmn"):
        speakers(read_table(table), ["zh", "cmn"])


def test_tags_with_a_script_and_old_tags_are_known(table):
    assert speakers(read_table(table), ["zh-Hant", "iw"]) == {"zh-Hant": 900, "iw": 10}
    with pytest.raises(InputError, match="zh-Hans and zh-Hant have the same speakers"):
        speakers(read_table(table), ["zh-Hans", "zh-Hant"])


def test_what_is_no_table_of_speakers_is_an_error(tmp_path):
    path = tmp_path / "other.tsv"
    path.write_text("code\tname\nen\tEnglish\n", encoding="utf-8")
    with pytest.raises(InputError, match="no column 'bcp_47_code'"):
        read_table(str(path))


@pytest.mark.parametrize("bad", [{"alpha": -1}, {"floor": 0.6}, {"cap": 0.3}, {"floor": 2}])
def test_what_no_shares_can_keep_is_an_error(table, bad):
    with pytest.raises(InputError):
        distribution(table, ["en", "he"], **bad)


def test_the_command_prints_the_shares(table, repository):
    command = [sys.executable, "-m", "data_pipelines.speakers", f"--table={table}"]
    run = subprocess.run(
        [*command, "--languages=en,he", "--cap=0.75"],
        cwd=repository,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert [line.split()[:2] for line in run.stdout.splitlines()] == [
        ["en", "75.000%"],
        ["he", "25.000%"],
    ]
    run = subprocess.run(
        [*command, "--languages=tlh"], cwd=repository, capture_output=True, text=True
    )
    assert run.returncode == 1
    assert run.stderr.startswith("error: ")


def test_linguameta_itself(shared_data):
    path = str(shared_data / "linguameta" / "linguameta" / "linguameta.tsv")
    everything = distribution(path)
    assert sum(everything.values()) == pytest.approx(1)
    assert len(everything) > 5000
    assert "zh" in everything
    assert "cmn" not in everything
    shares = distribution(path, ["zh", "en", "sw", "th", "iw"], alpha=0.3, floor=0.05, cap=0.3)
    assert sum(shares.values()) == pytest.approx(1)
    assert max(shares.values()) <= 0.3 + 1e-12
    assert min(shares.values()) >= 0.05 - 1e-12
    assert shares["sw"] > shares["th"] > shares["iw"]
