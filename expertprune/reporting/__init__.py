"""What people read: tables, model card, pictures, report."""
