"""Every way to spend bytes: the caches of the command and the demo, and the registry that evaluation compares."""
