# syntax=docker/dockerfile:1
#   docker build -t gpt2 .
#   docker run -it --gpus all -v gpt2:/home/gpt2/project gpt2                        # dvc repro
#   docker run -it --gpus all -v gpt2:/home/gpt2/project gpt2 python src/infer.py
# Without an NVIDIA GPU, drop --gpus all. The volume keeps the results, and the code that they were made with: after a
# new build, start with a new volume (docker volume rm gpt2). Ctrl-C saves a training; docker stop kills it.
# This file has been checked by reading only, without a Docker engine.
FROM python:3.11-slim-bookworm

ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_NO_CACHE_DIR=1 PATH=/home/gpt2/venv/bin:$PATH

# DVC needs git, and torch.compile needs gcc.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc git libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 gpt2 \
    && install --directory --owner gpt2 --group gpt2 /home/gpt2/project

USER gpt2
WORKDIR /home/gpt2/project

# The packages change less often than the code, so their layer comes first.
COPY --chown=gpt2 requirements.txt .
RUN python -m venv /home/gpt2/venv && pip install -r requirements.txt

COPY --chown=gpt2 . .

# dvc exp needs a commit to start from.
RUN git config --global user.name gpt2 \
    && git config --global user.email gpt2@localhost \
    && git init --quiet --initial-branch main \
    && git add --all \
    && git commit --quiet --message "The project as it was built into the image"

CMD ["dvc", "repro"]
