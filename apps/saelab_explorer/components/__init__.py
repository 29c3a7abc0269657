"""Parts of pages that Streamlit lacks: coloured tokens and clickable tables.

Their texts come from models and data sets, so everything enters the page through ``textContent``.
"""
