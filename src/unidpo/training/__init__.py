"""From a loaded model and prompt groups to a trained one."""
