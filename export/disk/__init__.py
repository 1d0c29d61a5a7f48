"""Reading and writing safetensors on the disk: files, directories, layout, staging, atomic moves."""
