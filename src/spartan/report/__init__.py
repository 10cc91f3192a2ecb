"""What a run did: terminal tables and one self-contained HTML page, counted in saved tensors."""
