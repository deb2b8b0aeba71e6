"""What people read of a study: tables, pictures, the report page and model cards. Torch-free on import."""
