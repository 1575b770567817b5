# The built-in model from an empty folder: which step needs which. Every step leaves a
# vlm.json or a records.jsonl behind, written last; what stands is not made again, and a
# step that was cut short goes on from its checkpoint.
#
#   make built-in        (from the repository's root)

VLM := .venv/bin/vlm
RUN := runs/builtin
DATA := $(RUN)/data
MODEL := vlm/builtin/model
SHIPPED := config.json generation_config.json model.safetensors tokenizer.json \
  tokenizer_config.json processor_config.json chat_template.jinja vlm.json

scenes = $(VLM) data build scenes --out $(@D)
held_out = $(VLM) data build scenes --out $(@D)-held-out --split test
train = $(VLM) train builtin-$(notdir $(@D))

.PHONY: parts joined ship
.DELETE_ON_ERROR:

# The two halves need nothing of each other: `make -j2 parts` with one thread for each.
parts: $(RUN)/tower/vlm.json $(RUN)/reading/vlm.json
joined: $(RUN)/instruct/vlm.json

ship: joined
	mkdir -p $(MODEL)
	cd $(RUN)/instruct && cp $(SHIPPED) $(abspath $(MODEL))

$(RUN)/close-ups/vlm.json: $(DATA)/close-ups/records.jsonl
	$(train)
$(RUN)/tower/vlm.json: $(RUN)/close-ups/vlm.json $(DATA)/phrases/records.jsonl
	$(train)
$(RUN)/lookup/vlm.json: $(DATA)/pairs/records.jsonl $(DATA)/language-sample/records.jsonl
	$(train)
$(RUN)/language/vlm.json: $(RUN)/lookup/vlm.json $(DATA)/language/records.jsonl
	$(train)
$(RUN)/reading/vlm.json: $(RUN)/language/vlm.json $(DATA)/reading/records.jsonl
	$(train)
$(RUN)/align/vlm.json: $(RUN)/tower/vlm.json $(RUN)/reading/vlm.json \
  $(DATA)/align/records.jsonl
	$(train)
# Two processes of one thread each train a third faster here than one of two threads.
$(RUN)/instruct/vlm.json: $(RUN)/align/vlm.json $(DATA)/instruct/records.jsonl
	OMP_NUM_THREADS=1 .venv/bin/torchrun --nproc-per-node 2 --no-python $(train)

$(DATA)/close-ups/records.jsonl:
	$(scenes) --task phrases --close-up --num 40000 --seed 1
$(DATA)/phrases/records.jsonl:
	$(held_out) --task phrases --num 512 --seed 2
	$(scenes) --task phrases --num 80000 --seed 2
$(DATA)/pairs/records.jsonl:
	$(held_out) --task pairs --num 512 --seed 3
	$(scenes) --task pairs --num 28000 --seed 3
$(DATA)/language-sample/records.jsonl:
	$(scenes) --task language --turns 2 --num 4000 --seed 3
$(DATA)/language/records.jsonl:
	$(held_out) --task language --num 512 --seed 4
	$(scenes) --task language --num 60000 --seed 4
$(DATA)/reading/records.jsonl:
	$(scenes) --task language --num 40000 --seed 7
$(DATA)/align/records.jsonl:
	$(held_out) --task align --num 256 --seed 5
	$(scenes) --task align --num 10000 --seed 5
$(DATA)/instruct/records.jsonl:
	$(held_out) --task instruct --num 256 --seed 6
	$(scenes) --task instruct --num 60000 --seed 6
