"""Entry point of the explorer: the frame, the run selector, and the page that was asked for."""

from __future__ import annotations

import streamlit as st

from saelab.errors import SaelabError
from saelab_explorer import frame, theme
from saelab_explorer.components.link import copy_link

st.set_page_config(page_title="saelab", page_icon=str(frame.HERE / "static" / "logo.png"), layout="wide")
st.html(theme.page_style())
st.logo(str(frame.HERE / "static" / "wordmark.svg"), icon_image=str(frame.HERE / "static" / "logo.svg"))

# the default page has no name of its own: Streamlit answers for it only at "/"
preference = st.Page(frame.PREFERENCE, title="Preference lab", icon=":material/balance:", url_path="preference")
trainings = st.Page(frame.TRAININGS, title="Runs", icon=":material/show_chart:", url_path="runs")
page = st.navigation(
    {
        "Read": [
            st.Page(frame.OVERVIEW, title="Overview", icon=":material/monitoring:", default=True),
            st.Page(frame.FEATURES, title="Features", icon=":material/table_rows:", url_path="features"),
            st.Page(frame.FEATURE, title="Feature", icon=":material/center_focus_strong:", url_path="feature"),
            st.Page(frame.PROMPT, title="Prompt", icon=":material/edit_note:", url_path="prompt"),
            st.Page(frame.COMPARE, title="Compare", icon=":material/compare_arrows:", url_path="compare"),
        ],
        "Intervene": [st.Page(frame.STEER, title="Steer", icon=":material/tune:", url_path="steer")],
        "Train": [trainings, preference],
    }
)
try:
    frame.choose_run(needed=page not in (preference, trainings))
    with st.sidebar:
        copy_link(key="copy_link")
    page.run()
except SaelabError as error:
    frame.failure(str(error))
