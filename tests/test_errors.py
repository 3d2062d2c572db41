from tucker_cam.errors import BadValueError, Failure


def test_a_failure_keeps_its_error_and_says_once_whose_it_is():
    error = BadValueError("a.png: too small\nmore")
    assert Failure("a.png", error).error is error
    assert str(Failure("a.png", error)) == "a.png: too small"
    assert str(Failure("b.png", error)) == "b.png: a.png: too small"
    assert str(Failure("b.png", KeyError())) == "b.png: KeyError"
