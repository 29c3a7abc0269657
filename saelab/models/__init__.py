"""Language models: loading, hook names, edits that undo themselves, generation, a demo model and a tiny one."""
