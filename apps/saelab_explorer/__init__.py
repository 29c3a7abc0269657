"""The explorer: a local web page that shows what every feature of a trained SAE does, and lets one steer with it."""
