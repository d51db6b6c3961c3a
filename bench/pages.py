"""Generated parts of pages that are otherwise written by hand."""


def between_markers(page: str, name: str, text: str) -> str:
    """`page` with `text` between `<!-- name:begin -->` and `<!-- name:end -->`.

    Raises:
        ValueError: the page has not each marker once.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if page.count(begin) != 1 or page.count(end) != 1:
        raise ValueError(f"page must have {begin} and {end} once each")
    before, rest = page.split(begin)
    return before + "\n".join([begin, text, end]) + rest.split(end)[1]
