"""What users need around the core, a file each: own images, choosing settings, pictures, data preparation."""
