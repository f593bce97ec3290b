"""What the readers of models and of data sets know about the client of the hub."""


def transport_error() -> type[Exception]:
    """The base of what goes wrong on the way: of httpx with huggingface_hub 1, of httpx2 with 2. It is no OSError."""
    from huggingface_hub import errors

    kind: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
    return kind
