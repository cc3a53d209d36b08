"""Self-collected stand-ins for datasets that cannot be reached, and the policies behind them."""
