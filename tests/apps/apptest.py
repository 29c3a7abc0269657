"""Run pages without a browser."""

from __future__ import annotations

from streamlit.testing.v1 import AppTest

from saelab_explorer import frame

APP = str(frame.HERE / "app.py")


def opened(page: str = frame.OVERVIEW, **query: str | list[str]) -> AppTest:
    """The app at ``page`` with an address, run once."""
    app = AppTest.from_file(APP, default_timeout=60).switch_page(page)
    for name, value in query.items():
        app.query_params[name] = value
    return rerun(app)


def rerun(app: AppTest) -> AppTest:
    app.run()
    assert not app.exception, app.exception[0].stack_trace
    return app


def words(app: AppTest) -> str:
    """All markup and text on the page, style sheets left out."""
    bodies = [element.proto.body for element in app.get("html")]
    return " ".join([body for body in bodies if "<style>" not in body] + [e.value for e in (*app.error, *app.caption)])
