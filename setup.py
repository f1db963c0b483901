"""What pyproject.toml cannot say: an installed package takes ``workloads_config/`` along."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
NAME = "workloads_config"


class BuildPy(build_py):
    """Copies the files into the package, unless it stays where it is (editable)."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for path in sorted((HERE / NAME).rglob("*.json")):
            target = Path(self.build_lib) / "algoperf_shampoo" / path.relative_to(HERE)
            self.mkpath(str(target.parent))
            self.copy_file(str(path), str(target))


setup(cmdclass={"build_py": BuildPy})
