"""Entry point of the explorer: the frame, the run selector, and the page that was asked for."""

from __future__ import annotations

import streamlit as st

from saelab.errors import SaelabError
from saelab_explorer import frame, theme

st.set_page_config(page_title="saelab", page_icon=str(frame.HERE / "static" / "logo.png"), layout="wide")
st.html(theme.page_style())
st.logo(str(frame.HERE / "static" / "wordmark.svg"), icon_image=str(frame.HERE / "static" / "logo.svg"))

# the default page has no name of its own: Streamlit answers for it only at "/"
page = st.navigation(
    {
        "Read": [
            st.Page(frame.OVERVIEW, title="Overview", icon=":material/monitoring:", default=True),
            st.Page(frame.FEATURES, title="Features", icon=":material/table_rows:", url_path="features"),
            st.Page(frame.FEATURE, title="Feature", icon=":material/center_focus_strong:", url_path="feature"),
            st.Page(frame.PROMPT, title="Prompt", icon=":material/edit_note:", url_path="prompt"),
        ],
        "Intervene": [st.Page(frame.STEER, title="Steer", icon=":material/tune:", url_path="steer")],
    }
)
try:
    frame.choose_run()
    page.run()
except SaelabError as error:
    st.error(str(error), icon=":material/error:")
