"""Explanations of features without a judge: rules that say, for every position of a text, whether a feature fires."""
