"""flash_dmattn.viz: what is drawn, read back from the artists, and compared with the mask and with counts."""

import subprocess
import sys

import pytest
import torch
from flash_dmattn import select_keys, viz

from counters import count

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402

SEQLEN, WINDOW = 60, 8


@pytest.fixture(autouse=True)
def _closed_figures():
    yield
    pyplot.close("all")


def selection(batch=2, heads=3, seqlen=SEQLEN):
    score = torch.randn(batch, heads, seqlen)
    score[..., 5] = -torch.inf  # a key that nobody sees
    return score, select_keys(score, WINDOW, num_sinks=2, local_window=3)


def dense_mask(expiry):
    """[Sq, Sk] of one head, by the definition of expiry."""
    position, key = torch.arange(len(expiry))[:, None], torch.arange(len(expiry))
    return (key <= position) & (position < expiry)


def bars_of(ax):
    """{key: (left, right)} of the bars, which must be as high as one key."""
    (collection,) = ax.collections
    bars = {}
    for path in collection.get_paths():
        (left, top), (right, bottom) = path.vertices.min(0), path.vertices.max(0)
        assert bottom == top + 1
        bars[int(top)] = (int(left), int(right))
    return bars


@pytest.mark.parametrize("batch, head", [(0, 0), (1, 2)])
def test_intervals(batch, head):
    score, expiry = selection()
    ax = viz.draw_intervals(expiry, score, batch=batch, head=head)
    bars, mask = bars_of(ax), dense_mask(expiry[batch, head])
    drawn = torch.zeros_like(mask)
    for key, (left, right) in bars.items():
        drawn[left:right, key] = True
    assert torch.equal(drawn, mask) and 5 not in bars
    assert ax.get_xlim() == (0, SEQLEN) and ax.get_ylim() == (SEQLEN, 0)
    assert "query" in ax.get_xlabel() and "key" in ax.get_ylabel()

    colours = dict(zip(bars, ax.collections[0].get_array().tolist()))
    ranked = sorted(bars, key=score[batch, head].tolist().__getitem__)
    assert sorted(bars, key=colours.__getitem__) == ranked
    assert [axes.get_ylabel() for axes in ax.figure.axes[1:]] == ["percentile of the key's score"]
    count("property", 4)


def test_intervals_of_one_head_in_axes_given():
    _, expiry = selection(1, 1)
    figure, (left, right) = pyplot.subplots(1, 2)
    assert viz.draw_intervals(expiry, ax=left) is left
    viz.draw_intervals(expiry[0, 0].long() + (expiry[0, 0] == SEQLEN), ax=right)  # past the end is no later
    assert bars_of(left) == bars_of(right) and len(bars_of(left)) > WINDOW
    assert left.collections[0].get_array() is None and len(figure.axes) == 2
    count("property", 2)


def test_mask():
    _, expiry = selection()
    ax = viz.draw_mask(expiry, batch=1, head=1)
    (image,) = ax.images
    visible, future = dense_mask(expiry[1, 1]), torch.ones(SEQLEN, SEQLEN, dtype=torch.bool).triu(1)
    cells = torch.from_numpy(image.get_array().data)
    assert torch.equal(cells == 2, visible) and torch.equal(cells == 0, future)
    colours = [matplotlib.colors.to_hex(image.to_rgba([value])[0]).upper() for value in (0, 1, 2)]
    assert colours == ["#FFFFFF", viz.NOT_VISIBLE, viz.COLORS[0]]
    patches = ax.get_legend().get_patches()
    assert [matplotlib.colors.to_hex(patch.get_facecolor()).upper() for patch in patches] == colours[:0:-1]
    count("property", 3)


def brute_survival(expiry):
    """Kaplan and Meier's estimate of expiry [B, Sk], key by key."""
    seqlen = expiry.shape[-1]
    keys = [(min(e, seqlen) - j, e < seqlen) for row in expiry.tolist() for j, e in enumerate(row)]
    share, shares = 1.0, []
    for lived in range(seqlen):
        evicted = sum(length == lived and is_evicted for length, is_evicted in keys)
        followed = evicted + sum(length > lived for length, _ in keys)
        share *= 1 - evicted / followed if followed else 1
        shares.append(share)
    return torch.tensor(shares, dtype=torch.float64)


def test_survival():
    _, expiry = selection()
    found = viz.survival(expiry)
    assert found.shape == (3, SEQLEN)
    for head in range(3):
        torch.testing.assert_close(found[head], brute_survival(expiry[:, head]), rtol=1e-12, atol=0)
    torch.testing.assert_close(viz.survival(expiry[0, 1]), viz.survival(expiry[:1, 1:2]), rtol=0, atol=0)
    assert (found[:, 2] > 0.9).all() and (found[:, 3] < 0.9).all()  # local_window=3
    count("property", 5)


def test_survival_of_the_extremes():
    """What the marks of draw_lifetimes stand for."""
    position = torch.arange(SEQLEN, dtype=torch.float32).expand(1, 1, SEQLEN)
    sliding, sinks = select_keys(position, WINDOW), select_keys(-position, WINDOW)
    everything = select_keys(position, SEQLEN)
    share = viz.survival(torch.cat((sliding, sinks, everything), 1))
    assert (share[0, :WINDOW] == 1).all() and (share[0, WINDOW:] == 0).all()
    torch.testing.assert_close(share[1], torch.full((SEQLEN,), WINDOW / SEQLEN, dtype=torch.float64))
    assert (share[2] == 1).all()
    count("property", 3)


@pytest.mark.parametrize("heads", [1, 3, 9])
def test_lifetimes(heads):
    _, expiry = selection(heads=heads)
    ax = viz.draw_lifetimes(expiry, WINDOW)
    *curves, vertical, horizontal = ax.lines
    assert len(curves) == heads
    for curve, share in zip(curves, viz.survival(expiry)):
        assert curve.get_drawstyle() == "steps-pre"
        points = dict(zip(curve.get_xdata().tolist(), curve.get_ydata().tolist()))
        assert min(points) == 1 and max(points) == SEQLEN
        drawn = [points[min(t for t in points if t >= lifetime)] for lifetime in range(1, SEQLEN + 1)]
        assert drawn == share.tolist()
    assert set(vertical.get_xdata()) == {WINDOW} and set(horizontal.get_ydata()) == {WINDOW / SEQLEN}
    assert ax.get_xscale() == ax.get_yscale() == "log"
    lowest, highest = ax.get_ylim()
    assert lowest < min(min(curve.get_ydata()) for curve in curves) and highest > 1
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    named = ["9 heads"] if heads == 9 else [f"head {head}" for head in range(heads)]
    assert labels == [*named, f"sliding window of {WINDOW}", f"{WINDOW} sinks alone"]
    count("property", 3)


def test_lifetimes_without_a_window():
    _, expiry = selection(1, 1)
    figure, ax = pyplot.subplots()
    assert viz.draw_lifetimes(expiry, ax=ax) is ax
    assert len(ax.lines) == 1 and ax.get_legend() is None
    nobody = viz.draw_lifetimes(torch.arange(SEQLEN))  # no key lives at all
    assert set(nobody.lines[0].get_ydata()) == {0}
    count("property", 2)


def test_pictures_can_be_saved(tmp_path):
    """Long ones too: nothing above draws a pixel."""
    _, expiry = selection(1, 2, 5000)
    for draw in (viz.draw_intervals, viz.draw_lifetimes):
        draw(expiry).figure.savefig(tmp_path / "picture.png")
        assert (tmp_path / "picture.png").stat().st_size > 5000
    viz.draw_mask(expiry[..., : viz.MAX_MASK]).figure.savefig(tmp_path / "picture.svg")


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda e: viz.draw_intervals(3), TypeError, "draw_intervals: expiry: got 3 (int)"),
        (lambda e: viz.draw_intervals(e.float()), ValueError, "draw_intervals: expiry: got torch.float32"),
        (lambda e: viz.draw_intervals(e[0]), ValueError, "got shape [3, 60], expected [B, Hkv, Sk] or [Sk]"),
        (lambda e: viz.draw_intervals(e[..., :0]), ValueError, "expiry: got shape [2, 3, 0]"),
        (lambda e: viz.draw_intervals(e, e), ValueError, "draw_intervals: score: got torch.int32"),
        (lambda e: viz.draw_intervals(e, e[0].float()), ValueError, "score: got shape [3, 60], expected exp"),
        (lambda e: viz.draw_intervals(e, head=3), ValueError, "head: got 3, expected an int from 0 to 2"),
        (lambda e: viz.draw_intervals(e[0, 0], batch=1), ValueError, "batch: got 1, expected an int from 0"),
        (lambda e: viz.draw_mask(e, head=True), TypeError, "draw_mask: head: got True (bool)"),
        (lambda e: viz.draw_mask(e.repeat(1, 1, 20)), ValueError, "at most 1024 keys; draw_intervals "),
        (lambda e: viz.draw_mask(e, ax=3), TypeError, "draw_mask: ax: got 3 (int), expected matplotlib Axes"),
        (lambda e: viz.draw_lifetimes(e, 0), ValueError, "draw_lifetimes: keep_window_size: got 0"),
        (lambda e: viz.draw_lifetimes(e[:, 0]), ValueError, "draw_lifetimes: expiry: got shape [2, 60]"),
        (lambda e: viz.survival(e.bool()), ValueError, "survival: expiry: got torch.bool"),
    ],
)  # fmt: skip
def test_refusals(call, error, message):
    _, expiry = selection()
    with pytest.raises(error) as caught:
        call(expiry)
    assert message in str(caught.value)
    assert not pyplot.get_fignums()  # nothing was begun
    count("refusal")


def test_without_matplotlib():
    """The module is imported all the same, and survival works."""
    code = (
        "import sys, torch; sys.path[:0] = eval(sys.argv[1]); from flash_dmattn import viz\n"
        "assert not any(name.split('.')[0] == 'matplotlib' for name in sys.modules)\n"
        "sys.modules['matplotlib'] = None\n"
        "viz.survival(torch.arange(9) + 1); viz.draw_mask(torch.arange(9))"
    )
    result = subprocess.run([sys.executable, "-c", code, repr(sys.path)], capture_output=True, text=True)
    last = result.stderr.strip().splitlines()[-1]
    assert last == "ImportError: draw_mask: needs matplotlib: pip install flash-dmattn[viz]", result.stderr
    count("refusal")
