"""Pictures of streams: what stands above which sample."""

import numpy as np
import pytest
import torch
from PIL import Image
from streams import STREAMS, write_data

from clagrange.cli import main
from clagrange.study.reporting.pictures import image_of, sample_figure
from clagrange.tasks import SplitClasses


def panels(figure):
    """Title and picture of each panel that shows one."""
    return [(axes.get_title(), axes.images[0].get_array()) for axes in figure.axes if axes.images]


def test_samples_are_those_that_are_trained_on_with_their_labels():
    stream = SplitClasses("digits", tasks=3)
    figure = sample_figure(stream, title="digits", tasks=2, samples=4)
    shown = panels(figure)
    assert len(shown) == 8
    for number in range(2):
        rows = stream.order(number, 0).flatten()[:4]
        inputs, targets = stream.task(number).batch(rows)
        for (label, picture), image, target in zip(shown[4 * number :], inputs, targets, strict=False):
            assert label == str(int(target))
            np.testing.assert_array_equal(picture, image[0])
    assert [axes.get_ylabel() for axes in figure.axes if axes.get_ylabel()] == ["task 0", "task 1"]


@pytest.mark.parametrize("make", STREAMS.values(), ids=STREAMS)
def test_every_stream_can_be_seen(make, tmp_path):
    write_data(tmp_path)
    stream = make(str(tmp_path))
    shown = panels(sample_figure(stream, title="a stream", tasks=9, samples=3))
    pictures = image_of(stream.task(0).inputs) is not None
    assert len(shown) >= (9 if pictures else 3)
    for _, picture in shown:
        assert np.isfinite(picture).all()
        if pictures:
            assert 0 <= picture.min() < picture.max() <= 1
    if stream.class_names is not None and pictures:
        assert {label for label, _ in shown} <= set(stream.class_names)


def test_flat_inputs_are_pictures_where_they_fill_a_square():
    assert image_of(torch.rand(2, 49)).shape == (2, 7, 7)
    colours = torch.rand(2, 3, 5, 5)
    np.testing.assert_array_equal(image_of(colours.flatten(1)), colours.permute(0, 2, 3, 1))
    assert image_of(torch.rand(2, 20)) is None
    assert image_of(torch.rand(2, 2, 8, 8)) is None
    standardised = image_of(torch.randn(4, 3, 5, 5))
    assert (standardised.min(), standardised.max()) == (0, 1)


def test_show_writes_a_picture(tmp_path, capsys):
    out = tmp_path / "new" / "picture.png"
    arguments = ["show", "label_permuted", "examples=50", "--tasks", "2", "--seed", "3", "--out", str(out)]
    assert main(arguments) == 0
    assert str(out) in capsys.readouterr().out.replace("\n", "")
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 300
        assert np.asarray(picture).std() > 10
    assert main(["show", "permuted_digits", "tasks=3", "--preset", "small", "--out", str(out)]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["label_permted"], "did you mean 'label_permuted'?"),
        (["label_permuted", "exmples=50"], "did you mean 'examples'?"),
        (["label_permuted", "examples"], "settings: expected key=value, got 'examples'"),
        (["label_permuted", "--preset", "smal"], "did you mean 'small'?"),
        (["label_permuted", "--tasks", "0"], "tasks: expected a whole number of at least 1, got 0"),
        (["label_permuted", "source=none.npz", "root=FOLDER"], "found none at"),
        (["continual_image_net"], "source"),
    ],
)
def test_bad_requests_give_one_line(tmp_path, capsys, arguments, message):
    out = tmp_path / "picture.png"
    filled = [argument.replace("FOLDER", str(tmp_path)) for argument in arguments]
    assert main(["show", *filled, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()
