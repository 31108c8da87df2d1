"""The notebooks executed headlessly, one stage after another."""
