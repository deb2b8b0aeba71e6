"""The study: its one record, its artifacts and its front."""
