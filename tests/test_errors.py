from tucker_cam.errors import BadFileError, BadTypeError, BadValueError, Failure, MissingPackageError, TuckerCamError


def test_each_error_is_ours_and_the_built_in_one():
    pairs = {
        BadValueError: ValueError,
        BadTypeError: TypeError,
        BadFileError: OSError,
        MissingPackageError: ModuleNotFoundError,
    }
    for error, built_in in pairs.items():
        assert issubclass(error, TuckerCamError)
        assert issubclass(error, built_in)


def test_a_failure_keeps_its_error_and_says_once_whose_it_is():
    error = BadValueError("a.png: too small\nmore")
    assert Failure("a.png", error).error is error
    assert str(Failure("a.png", error)) == "a.png: too small"
    assert str(Failure("b.png", error)) == "b.png: a.png: too small"
    assert str(Failure("b/a.png", BadValueError("/c/b/a.png: bad"))) == "/c/b/a.png: bad"
    assert str(Failure("a", BadValueError("expected a picture, got a: bad"))) == "a: expected a picture, got a: bad"
    assert str(Failure("b.png", KeyError())) == "b.png: KeyError"
