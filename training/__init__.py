"""Jobs that learn from a database: mappers, calibration, evaluation; icon_sd makes the small base model."""
