"""Synthetic tasks: options, exact prediction against brute force, and texts that are what their source says."""

import hashlib
import math
import sys
from itertools import pairwise, permutations, product
from pathlib import Path

import numpy as np
import pytest

from kalmagrove.data.packing import default_data_folder, prepare
from kalmagrove.data.sources import is_hub_name, iter_documents, source_fingerprint
from kalmagrove.data.splits import SPLITS, split_documents
from kalmagrove.data.synthetic.draws import RowChoices, UniformDraws
from kalmagrove.data.synthetic.hidden_markov import HiddenMarkov, sample_paths
from kalmagrove.data.synthetic.markov import STAY, MarkovSource
from kalmagrove.data.synthetic.options import MarkovOptions, RecallOptions, full_name, held_out_tokens, parse_synthetic
from kalmagrove.data.synthetic.recall import Answer, RecallSource
from kalmagrove.data.synthetic.source import open_synthetic, synthetic_splits, synthetic_tokenizer
from kalmagrove.data.synthetic.words import END, FIRST_WORD
from kalmagrove.data.tokenizer import save_tokenizer
from kalmagrove.errors import KalmaGroveError, UsageError

SMALL_MARKOV = "synthetic:markov,states=8,symbols=13,length=37,tokens=3k"
SMALL_RECALL = "synthetic:recall,pairs=3,queries=4,keys=7,values=5,distractors=6,length=37,tokens=3k"
BOTH = pytest.mark.parametrize("source", [SMALL_MARKOV, SMALL_RECALL], ids=["markov", "recall"])


def stream_of(source: MarkovSource | RecallSource, stream: int, tokens: int) -> np.ndarray:
    """Documents with their ends, joined."""
    return np.concatenate([np.append(document, END) for document in source.documents(stream, tokens)])


def windows_of(stream: np.ndarray, length: int) -> np.ndarray:
    return np.lib.stride_tricks.sliding_window_view(stream, length)


def test_options_left_out_are_written_out() -> None:
    options = parse_synthetic("synthetic:markov,states=64,tokens=20k")
    assert options == MarkovOptions(states=64, tokens=20_000)
    assert full_name(options) == "synthetic:markov,states=64,levels=3,symbols=256,length=1024,tokens=20000,seed=0"
    assert parse_synthetic(full_name(options)) == options
    recall = parse_synthetic("synthetic:recall,pairs=5")
    assert recall == RecallOptions(pairs=5) and parse_synthetic(full_name(recall)) == recall


@pytest.mark.parametrize("levels", range(1, 11))
def test_states_are_a_power_of_the_levels(levels: int) -> None:
    possible = [value**levels for value in range(2, 1025) if value**levels <= 1024]
    assert [MarkovOptions(states=states, levels=levels).values ** levels for states in possible] == possible
    with pytest.raises(
        UsageError, match=rf"states=1023 is no whole number to the power of levels={levels}|out of range"
    ):
        MarkovOptions(states=1023 if levels > 1 else 1025, levels=levels)


WRONG = {
    "synthetic:": "unknown synthetic task ''; there are synthetic:markov with states=512 (2 to 1024)",
    "synthetic:markow": "synthetic:recall with pairs=8 (1 to 128), queries=8",
    "synthetic:markov,state=4": "synthetic:markov has no option 'state'; its options: states=512 (2 to 1024), levels=3",
    "synthetic:markov,": "synthetic:markov has no option ''",
    "synthetic:markov,states=-4": "states=-4 is no whole number; its options: states=512",
    "synthetic:markov,states=4.0": "states=4.0 is no whole number",
    "synthetic:markov,states": "states= is no whole number",
    "synthetic:markov,states=\u00b2": "is no whole number",
    "synthetic:markov,seed=1,seed=2": "seed is given twice",
    "synthetic:markov,symbols=1": "symbols=1 is out of range; its options: states=512 (2 to 1024)",
    "synthetic:markov,tokens=9999b": "tokens=9999000000000 is out of range",
    "synthetic:markov,states=60": "use for example states=27 or states=64",
    "synthetic:markov,states=4": "use for example states=8",
    "synthetic:recall,pairs=9,keys=8": "pairs=9 need as many keys, but keys=8",
    "synthetic:recall,pairs=4,queries=4,length=19": "pairs=4 and queries=4 take 20 tokens, but length=19",
}


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_wrong_options_are_one_line_that_says_what_is_right(case: int) -> None:
    source, message = list(WRONG.items())[case]
    with pytest.raises(UsageError) as raised:
        parse_synthetic(source)
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_choices_follow_their_rows_and_never_take_what_has_no_chance() -> None:
    rows = np.array([[0.2, 0.0, 0.5, 0.3, 0.0], [0.0, 1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1 / 3, 1 / 3, 1 / 3]])
    draws = UniformDraws(3)
    chosen = np.arange(30_000) % 3
    entries = RowChoices(rows).draw(chosen, draws.uniform(30_000))
    for row, chances in enumerate(rows):
        shares = np.bincount(entries[chosen == row], minlength=5) / 10_000
        assert np.all(shares[chances == 0] == 0) and np.abs(shares - chances).max() < 0.02
    edges = np.array([0.0, 1 - 2.0**-40])
    assert RowChoices(rows).draw(np.array([2, 2]), edges).tolist() == [2, 4]
    assert RowChoices(rows).draw(np.array([0, 0]), edges).tolist() == [0, 3]


def test_draws_are_uniform_numbers_below_one_and_geometric_with_their_mean() -> None:
    draws = UniformDraws(5, 7)
    uniform = draws.uniform(100, 200)
    assert uniform.shape == (100, 200) and uniform.min() >= 0 and uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 0.01 and abs(uniform.var() - 1 / 12) < 0.002
    steps = draws.geometric(3.0, 40_000)
    assert steps.min() == 0 and abs(steps.mean() - 3.0) < 0.1
    assert abs((steps == 0).mean() - 1 / 4) < 0.01 and abs((steps == 2).mean() - 9 / 64) < 0.01
    assert not draws.geometric(0.0, 5).any()
    assert np.unique(draws.below(7, 1000)).tolist() == list(range(7))
    assert not np.array_equal(UniformDraws(5, 8).uniform(9), UniformDraws(5, 7).uniform(9))


def tiny_chain() -> HiddenMarkov:
    draws = UniformDraws(11)
    transition = draws.distributions(3, 3, sparsity=1.0)
    transition[0, 1] = 0.0
    return HiddenMarkov(transition / transition.sum(axis=1, keepdims=True), draws.distributions(3, 4, sparsity=1.0))


def probability_by_paths(chain: HiddenMarkov, tokens: tuple[int, ...]) -> float:
    """The sum over all paths of states."""
    total = 0.0
    for path in product(range(len(chain.transition)), repeat=len(tokens)):
        chance = chain.stationary[path[0]] * math.prod(chain.transition[a, b] for a, b in pairwise(path))
        total += chance * math.prod(chain.emission[state, token] for state, token in zip(path, tokens, strict=True))
    return float(total)


def test_the_forward_algorithm_is_the_sum_over_all_paths() -> None:
    chain = tiny_chain()
    windows = list(product(range(4), repeat=5))[::7]
    nats = chain.window_nats(np.array(windows))
    assert nats.shape == (len(windows), 4) and nats.dtype == np.float64
    for window, own in zip(windows, nats, strict=True):
        for end in range(2, 6):
            expected = probability_by_paths(chain, window[:end]) / probability_by_paths(chain, window[: end - 1])
            assert own[end - 2] == pytest.approx(-math.log(expected), rel=1e-12)


def test_the_stationary_chances_stay() -> None:
    for chain in (tiny_chain(), open_synthetic(SMALL_MARKOV).model, open_synthetic(SMALL_RECALL).plan):
        assert chain.stationary @ chain.transition == pytest.approx(chain.stationary, abs=1e-14)
        assert chain.stationary.sum() == pytest.approx(1.0) and chain.stationary.min() >= 0
        assert chain.transition.sum(axis=1) == pytest.approx(np.ones(len(chain.transition)))
        assert chain.emission.sum(axis=1) == pytest.approx(np.ones(len(chain.transition)))


def test_windows_are_scored_alike_in_any_number(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = tiny_chain()
    windows, _ = chain.sample_windows(17, 9, UniformDraws(2))
    together = chain.window_nats(windows)
    monkeypatch.setattr("kalmagrove.data.synthetic.hidden_markov.BELIEF_BUDGET", 7)
    assert chain.window_nats(windows) == pytest.approx(together, rel=1e-13)


def test_a_text_of_another_source_is_refused() -> None:
    chain = HiddenMarkov(np.eye(2)[[1, 0]], np.eye(2))
    assert chain.window_nats(np.array([[0, 1, 0]])) == pytest.approx(0.0)
    with pytest.raises(KalmaGroveError, match="cannot come from this synthetic source"):
        chain.window_nats(np.array([[0, 1, 0], [0, 1, 1]]))
    with pytest.raises(KalmaGroveError, match="cannot come from this synthetic source"):
        source = open_synthetic(SMALL_RECALL)
        key, value = source.first_key, source.first_value
        source.window_nats(np.array([[END, key, value, FIRST_WORD, key, value + 1]]))


def test_paths_have_their_lengths_and_follow_the_chain() -> None:
    chain = tiny_chain()
    lengths = np.array([3, 1, 400, 7, 400, 1, 9000])
    first = np.array([0, 1, 2, 0, 1, 2, 0])
    paths = sample_paths(RowChoices(chain.transition), first, lengths, UniformDraws(1))
    assert [len(path) for path in paths] == lengths.tolist()
    assert [path[0] for path in paths] == first.tolist()
    counts = np.zeros((3, 3))
    for path in paths:
        np.add.at(counts, (path[:-1], path[1:]), 1)
    assert counts / counts.sum(axis=1, keepdims=True) == pytest.approx(chain.transition, abs=0.03)
    assert counts[0, 1] == 0


@pytest.mark.parametrize(("states", "levels"), [(5, 1), (9, 2), (8, 3)])
def test_levels_move_as_the_source_says(states: int, levels: int) -> None:
    """Against a plain reading of the description, state by state."""
    source = MarkovSource(MarkovOptions(states=states, levels=levels, symbols=13, length=37))
    moves, starts, words = source._tables
    count = source.options.values
    values = list(product(range(count), repeat=levels))
    rarely = [STAY ** -(levels - 1 - level) for level in range(levels)]
    chances = np.diff([0.0, *rarely])

    def began(state: tuple[int, ...], level: int) -> float:
        return math.prod(starts[i][state[i - 1] if i else 0, state[i]] for i in range(level, levels))

    for place, old in enumerate(values):
        for other, new in enumerate(values):
            expected = 0.0
            for level in range(levels):
                if old[:level] == new[:level]:
                    move = moves[level][old[level - 1] if level else 0, old[level], new[level]]
                    expected += chances[level] * move * began(new, level + 1)
            assert source.model.transition[place, other] == pytest.approx(expected * (1 - 1 / 37), rel=1e-12)
    assert source.model.transition[:-1, -1] == pytest.approx(1 / 37)
    assert source.model.transition[-1, :-1] == pytest.approx([began(state, 0) for state in values])
    assert source.model.emission[:-1, FIRST_WORD:] == pytest.approx(np.stack([words[state[-1]] for state in values]))


def test_markov_documents_are_the_chain_of_the_model() -> None:
    source = open_synthetic(SMALL_MARKOV)
    stream = stream_of(source, 1, 200_000)
    lengths = np.diff(np.flatnonzero(stream == END))
    assert abs(lengths.mean() - 38) < 2 and lengths.min() >= 2
    shares = np.bincount(stream, minlength=15) / len(stream)
    assert shares == pytest.approx(source.model.stationary @ source.model.emission, abs=0.01)
    joint = np.zeros((15, 15))
    np.add.at(joint, (stream[:-1], stream[1:]), 1 / (len(stream) - 1))
    model = source.model
    weighted = model.stationary[:, None] * model.emission
    assert joint == pytest.approx(weighted.T @ model.transition @ model.emission, abs=0.005)


def full_recall_chain(source: RecallSource) -> HiddenMarkov:
    """The same language as one hidden Markov chain whose states know the keys and values of the whole document."""
    chosen = source.options
    rows: list[tuple[int | None, int]] = []
    following: list[list[tuple[int, float]]] = [[]]
    emitted: list[int | None] = [END]
    keys = range(source.first_key, source.first_value)
    values = range(source.first_value, source.first_noise)
    books = [(k, v) for k in permutations(keys, chosen.pairs) for v in product(values, repeat=chosen.pairs)]
    noise = chosen.gap / (1 + chosen.gap)

    def state(token: int | None) -> int:
        emitted.append(token)
        following.append([])
        return len(emitted) - 1

    def gap_after(ends: list[int], share: list[float], begins: list[tuple[int, float]]) -> None:
        """From each end into noise, or past it, to one of the beginnings."""
        waiting = state(None)
        following[waiting] = [(waiting, noise), *((begin, (1 - noise) * chance) for begin, chance in begins)]
        for end, chance in zip(ends, share, strict=True):
            following[end] += [(waiting, noise * chance), *((b, (1 - noise) * c * chance) for b, c in begins)]

    for own_keys, own_values in books:
        ends, share = [END], [1 / len(books)]
        for key, value in zip(own_keys, own_values, strict=True):
            first, second = state(key), state(value)
            following[first] = [(second, 1.0)]
            gap_after(ends, share, [(first, 1.0)])
            ends, share = [second], [1.0]
        for _ in range(chosen.queries):
            mark, answers = state(FIRST_WORD), []
            for key, value in zip(own_keys, own_values, strict=True):
                first, second = state(key), state(value)
                following[mark].append((first, 1 / chosen.pairs))
                following[first] = [(second, 1.0)]
                answers.append(second)
            gap_after(ends, share, [(mark, 1.0)])
            ends, share = answers, [1.0] * len(answers)
        for end in ends:
            following[end] = [(END, 1.0)]
    assert not rows
    transition = np.zeros((len(emitted), len(emitted)))
    for row, targets in enumerate(following):
        for target, chance in targets:
            transition[row, target] += chance
    emission = np.zeros((len(emitted), len(source.kinds)))
    for row, token in enumerate(emitted):
        if token is None:
            emission[row, source.first_noise :] = 1 / chosen.distractors
        else:
            emission[row, token] = 1.0
    return HiddenMarkov(transition, emission)


@pytest.mark.parametrize(
    "options",
    [
        {"pairs": 2, "queries": 2, "keys": 3, "values": 2, "distractors": 2, "length": 13},
        {"pairs": 1, "queries": 3, "keys": 3, "values": 3, "distractors": 1, "length": 14},
        {"pairs": 3, "queries": 1, "keys": 3, "values": 2, "distractors": 1, "length": 10},
        {"pairs": 2, "queries": 3, "keys": 4, "values": 2, "distractors": 3, "length": 13},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_the_best_prediction_of_recall_is_that_of_a_chain_that_knows_whole_documents(options: dict[str, int]) -> None:
    source = RecallSource(RecallOptions(**options))
    chain = full_recall_chain(source)
    windows = windows_of(stream_of(source, 1, 3000), 17)[::5]
    first_kinds = {int(kind) for kind in source.kinds[windows[:, 0]]}
    assert len(first_kinds) == (5 if source.options.gap else 4)
    assert source.window_nats(windows) == pytest.approx(chain.window_nats(windows), abs=1e-9)


def test_recall_documents_are_pairs_and_then_questions_with_right_answers() -> None:
    source = open_synthetic(SMALL_RECALL)
    chosen = source.options
    lengths, asked = [], []
    for document in source.documents(1, 60_000):
        kinds = source.kinds[document]
        spoken = document[kinds != 1].tolist()
        pairs, questions = spoken[: 2 * chosen.pairs], spoken[2 * chosen.pairs :]
        book = dict(zip(pairs[::2], pairs[1::2], strict=True))
        assert len(book) == chosen.pairs and len(questions) == 3 * chosen.queries
        assert set(questions[::3]) == {FIRST_WORD}
        assert [book[key] for key in questions[1::3]] == questions[2::3]
        asked += [list(book).index(key) for key in questions[1::3]]
        lengths.append(len(document))
    assert abs(np.mean(lengths) - chosen.length) < 1.5
    assert np.bincount(asked) / len(asked) == pytest.approx(np.full(chosen.pairs, 1 / chosen.pairs), abs=0.03)


def test_a_text_without_noise_is_possible() -> None:
    source = RecallSource(RecallOptions(pairs=2, queries=2, keys=4, values=3, length=10))
    assert {len(document) for document in source.documents(1, 500)} == {10}
    rate = (math.log(4 * 3) + 2 * math.log(3) + 2 * math.log(2)) / 11
    assert source.entropy_rate() == pytest.approx(rate)
    stream = stream_of(source, 1, 60_000)
    assert source.window_nats(windows_of(stream, 1101)[::1100]).mean() == pytest.approx(rate, rel=0.02)


def test_answers_name_the_last_mention_in_the_window() -> None:
    source = open_synthetic(SMALL_RECALL)
    key, value, noise, ask = source.first_key, source.first_value, source.first_noise, FIRST_WORD
    window = [
        key,
        value,
        noise,
        key + 1,
        value,
        ask,
        key,
        value,
        ask,
        key + 2,
        value,
        ask,
        key,
        value,
        END,
        ask,
        key,
        value,
    ]
    assert source.answers(window) == [Answer(7, 6, 2), Answer(13, 6, 3)]
    assert source.answers([value, ask, key, value, ask, key, value]) == [Answer(6, 3, 1)]


@BOTH
def test_the_tokeniser_gives_one_token_a_word(source: str, tmp_path: Path) -> None:
    known, tokenizer = open_synthetic(source), synthetic_tokenizer(source)
    documents = [document.tolist() for document in known.documents(2, held_out_tokens(known.options))]
    texts = list(synthetic_splits(source)["valid"])
    assert [tokenizer.encode(text).ids for text in texts] == documents
    assert tokenizer.get_vocab_size() == FIRST_WORD + len(known.words) == len(set(known.words)) + FIRST_WORD
    assert tokenizer.decode(tokenizer.encode(texts[0]).ids) == " " + texts[0]
    assert tokenizer.encode("never heard").ids == [1, 1]
    from transformers import AutoTokenizer

    save_tokenizer(tokenizer, tmp_path, context_length=64)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded(texts[0])["input_ids"] == tokenizer.encode(texts[0]).ids
    assert loaded.eos_token_id == END


@BOTH
def test_splits_come_from_streams_of_their_own_and_are_always_the_same(source: str) -> None:
    first, second = (list(split_documents(source)) for _ in range(2))
    assert first == second and {split for split, _ in first} == set(SPLITS)
    assert [text for _, text in first] == list(iter_documents(source))
    texts = {split: [text for own, text in first if own == split] for split in SPLITS}
    long = {split: {text for text in own if len(text) > 60} for split, own in texts.items()}
    assert all(long.values()) and not long["train"] & long["valid"] | long["train"] & long["test"]
    assert not long["valid"] & long["test"]
    words = {split: sum(len(text.split()) + 1 for text in own) for split, own in texts.items()}
    assert words["train"] == pytest.approx(3000, rel=0.3)
    assert words["valid"] == pytest.approx(held_out_tokens(parse_synthetic(source)), rel=0.3)
    assert list(iter_documents(source + ",seed=1")) != [text for _, text in first]


PINNED = {SMALL_MARKOV: "30784f7442977ea4", SMALL_RECALL: "a7cf1cd3bbe647db"}


@BOTH
def test_the_text_is_the_same_in_every_version(source: str) -> None:
    """A change here changes what earlier results mean: change the generator's number too."""
    text = "\n".join(list(iter_documents(source))[:40])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == PINNED[source]


@BOTH
def test_a_source_is_packed_and_known_by_its_options(source: str, tmp_path: Path) -> None:
    packed = prepare(source, tmp_path / "data")
    options = parse_synthetic(source)
    assert packed.source == full_name(options)
    assert packed.vocab_size == FIRST_WORD + len(open_synthetic(source).words)
    assert packed.end_of_text_id == END
    expected = [np.append(document, END) for document in open_synthetic(source).documents(3, held_out_tokens(options))]
    assert np.array_equal(packed.tokens("test"), np.concatenate(expected))
    assert packed.splits["test"].words == packed.splits["test"].tokens - packed.splits["test"].documents
    assert prepare(full_name(options), tmp_path / "data", vocab_size=999).fingerprint == packed.fingerprint
    with pytest.raises(KalmaGroveError, match="was prepared with"):
        prepare(source + ",seed=1", tmp_path / "data")
    with pytest.raises(UsageError, match=r"comes with its own tokenizer; leave gpt2 out"):
        prepare(source, tmp_path / "other", tokenizer="gpt2")
    assert not (tmp_path / "other").exists()


@BOTH
def test_names_with_the_same_options_are_the_same_source(source: str, tmp_path: Path) -> None:
    same, other = full_name(parse_synthetic(source)), source + ",seed=5"
    assert source_fingerprint(source) == source_fingerprint(same) != source_fingerprint(other)
    folders = [default_data_folder(name, 4096, None, 0, tmp_path) for name in (source, same, other)]
    assert folders[0] == folders[1] != folders[2]
    assert folders[0].name.startswith(source.split(",")[0].replace(":", "-"))
    assert not is_hub_name(source)


def test_the_options_need_no_library() -> None:
    import subprocess

    lines = "import sys, kalmagrove.data.synthetic.options; print({'torch', 'numpy', 'tokenizers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", lines], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
