"""Other libraries' training steps, in an environment of their own, timed round by round beside ours."""
