"""What every part uses and nothing here knows about models: files, tables, progress, plug-ins."""
