"""PyInstaller's hook: data files, modules that are imported by name, and the sources of the CPU's kernels."""

from __future__ import annotations

from PyInstaller.utils.hooks import collect_data_files, collect_submodules

datas = collect_data_files("tinyllm")
hiddenimports = collect_submodules("tinyllm", filter=lambda name: "_pyinstaller" not in name)
module_collection_mode = {"tinyllm.kernels.cpu": "pyz+py"}  # compiled for the user's processor
