"""Sheets of frames with what is said of them."""

import numpy as np
import pytest
from video_files import moving

from engine.errors import UsageError
from engine.media import contact_sheet

Image = pytest.importorskip("PIL.Image")


@pytest.mark.parametrize("columns", [1, 2])
def test_contact_sheet(tmp_path, columns):
    rows = [("red " * 30, "a caption " * 20, moving(9)), ("unbroken" * 20, "", moving(3, seed=1))]
    contact_sheet(tmp_path / "sheet.png", rows, columns)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    paper = (244, 244, 241)
    strip = 5 * 64 + 4 * 4
    pitch = 24 + strip + 24 + 280 + 24
    assert sheet.shape[1] == columns * pitch and (sheet[0, 0] == paper).all()
    for slot, source in enumerate([0, 2, 4, 6, 8]):
        left = 24 + slot * (64 + 4)
        shown = sheet[24 : 24 + 48, left : left + 64]
        np.testing.assert_array_equal(shown[::2, ::2], rows[0][2][source])
        np.testing.assert_array_equal(shown[1::2, 1::2], rows[0][2][source])
    text = sheet[:, 24 + strip + 24 : pitch - 24]
    assert (text.max(-1) < 60).sum() > 500
    assert (sheet[30:40, pitch - 24 : pitch] == paper).all()
    second = sheet[:, pitch:] if columns == 2 else sheet[sheet.shape[0] // 2 :]
    assert (second.reshape(-1, 3) == moving(3, seed=1)[0, 0, 0]).all(1).sum() >= 16


def test_contact_sheet_rules(tmp_path):
    for name, rows, columns in [
        ("a.jpg", [("", "", moving(1))], 1),
        ("a.png", [], 1),
        ("a.png", [("", "", moving(1))], 0),
        ("a.png", [("", "", moving(1)[0])], 1),
    ]:
        with pytest.raises(UsageError):
            contact_sheet(tmp_path / name, rows, columns)
    assert list(tmp_path.iterdir()) == []
    contact_sheet(tmp_path / "a.png", [("", "", moving(1))])
    assert (tmp_path / "a.png").is_file()
