"""benchmarks/startup.py on few images: it runs, and leaves nothing behind."""

import os
import shutil

from benchmarks import startup


def test_it_prints_a_row_each_and_removes_its_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda program: None)  # strace takes long
    startup.main(["--images", "300", "--classes", "5", "--rounds", "1", "--folder", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert "300 images in 5 classes" in lines[0]
    assert os.listdir(tmp_path) == []
    assert [sum(line.startswith(name) for line in lines) for name in startup.LISTINGS] == [1, 2, 1]
    if os.path.exists(startup.MEMORY):
        rows = [line.split() for line in lines if line.startswith(("our paths  ", "a list of str"))]
        assert len(rows) == 2 * startup.WORKERS
        assert all(float(row[-2]) >= float(row[-1]) > 0 for row in rows)  # resident, private
