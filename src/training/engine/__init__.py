"""The training engine: everything that trains runs on it. It knows no model, no method and no data set."""
