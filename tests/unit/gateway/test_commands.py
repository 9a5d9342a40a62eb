import pytest

from gateway.commands import WORKERS_MAX, serve


@pytest.mark.parametrize("workers", ["0", str(WORKERS_MAX + 1), "two"])
def test_a_number_of_workers_out_of_range_is_refused(workers: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        serve(["--workers", workers])
    assert exit_.value.code == 2
    assert "--workers" in capsys.readouterr().err
