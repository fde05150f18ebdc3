//! Plans from a file of measured load, or as if all experts were alike; and the layout that is asked for.

use std::path::{Path, PathBuf};

use cadre_placement::{DomainIndex, ExpertLoad, PlanError, affordable_copies, plan_initial, plan_spread};
use cadre_types::{LayerId, LayerPlacement, Layout, ModelConfig, Placement, PlacementEpoch};

use crate::{error::RouterError, options::RouterOptions};

/// Looked for in the checkpoint's folder when no file is named.
const LOAD_FILE: &str = "cadre-expert-load.json";

/// Largest load file. V3 needs 59 layers × 256 counts of at most 21 characters: 320 KB.
const MAX_LOAD_BYTES: u64 = 64 << 20;

/// Largest layout file; three numbers and their names.
const MAX_LAYOUT_BYTES: u64 = 64 << 10;

/// Slots per expert, on average, of the largest placement that is taken over from a member: eight times what copies
/// for failures need. Members hold and describe every shard of a placement, so somebody else's word bounds it.
const MAX_COPIES: usize = 16;

/// Plans placements of one model.
#[derive(Clone, Debug)]
pub(crate) struct Planner {
    load: ExpertLoad,
}

impl Planner {
    /// A planner for the load that the options name.
    pub(crate) fn new(options: &RouterOptions, config: &ModelConfig) -> Result<Self, RouterError> {
        Ok(Self { load: expert_load(options, config)? })
    }

    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn for_load(load: ExpertLoad) -> Self {
        Self { load }
    }

    /// The load that plans are made for.
    pub(crate) fn load(&self) -> &ExpertLoad {
        &self.load
    }

    pub(crate) fn plan(
        &self,
        layout: Layout,
        domains: &[Option<DomainIndex>],
        epoch: PlacementEpoch,
    ) -> Result<Placement, PlanError> {
        plan_initial(&self.load, self.load.num_experts(), layout, domains, epoch)
    }

    /// The next placement if shards are in other domains than this one was planned for and copies can be moved apart.
    pub(crate) fn spread(
        &self,
        placement: &Placement,
        layout: Layout,
        domains: &[Option<DomainIndex>],
        epoch: PlacementEpoch,
    ) -> Result<Option<Placement>, PlanError> {
        plan_spread(&self.load, placement, usize::from(layout.min_copies), domains, epoch)
    }

    /// Whether a placement is one that this or an earlier coordinator can have planned for this model.
    pub(crate) fn fits(&self, placement: &Placement) -> Result<(), String> {
        let (experts, shards) = (self.load.num_experts(), placement.num_shards());
        if placement.num_experts() != experts {
            return Err(format!("{} experts, the model has {experts}", placement.num_experts()));
        }
        let ids = |layers: &mut dyn Iterator<Item = LayerId>| layers.map(|id| id.0).collect::<Vec<_>>();
        let expected = ids(&mut self.load.layers().iter().map(|layer| layer.layer));
        let found = ids(&mut placement.layers().iter().map(|layer| layer.layer));
        if found != expected || found.is_empty() {
            return Err(format!("layers {found:?}, those with experts are {expected:?}"));
        }
        let slots = |layer: &LayerPlacement| layer.slots.iter().map(Vec::len).sum::<usize>();
        let first = placement.layers().first().map_or(0, slots);
        for layer in placement.layers() {
            let (at, slots) = (layer.layer, slots(layer));
            if layer.slots.iter().any(Vec::is_empty) {
                return Err(format!("{at}: a shard of {shards} has no slot"));
            }
            if slots != first {
                return Err(format!("{at}: {slots} slots, other layers have {first}"));
            }
        }
        let most = MAX_COPIES * experts;
        if first > most {
            return Err(format!("{first} slots per layer, at most {most} are taken over"));
        }
        Ok(())
    }

    /// The layout that a placement of this model has.
    pub(crate) fn layout_of(&self, placement: &Placement) -> Layout {
        let slots = |slots: &[Vec<_>]| slots.iter().map(Vec::len).sum::<usize>();
        let slots = placement.layers().iter().map(|layer| slots(&layer.slots)).min().unwrap_or(0);
        let redundant = slots.saturating_sub(placement.num_experts());
        Layout {
            // A placement's shards have 16-bit ids, and no expert has more copies than there are shards.
            shards: placement.num_shards() as u16,
            redundant_slots: u32::try_from(redundant).unwrap_or(u32::MAX),
            min_copies: fewest_copies(placement) as u16,
        }
    }

    /// Whether a placement gives what a layout asks for.
    pub(crate) fn satisfies(&self, placement: &Placement, layout: Layout) -> bool {
        let has = self.layout_of(placement);
        (has.shards, has.redundant_slots) == (layout.shards, layout.redundant_slots)
            && has.min_copies >= layout.min_copies
    }
}

fn fewest_copies(placement: &Placement) -> usize {
    // Expert ids have 16 bits.
    let experts = || (0..placement.num_experts()).map(|expert| cadre_types::LogicalExpert(expert as u16));
    let layers = placement.layers().iter();
    let copies =
        layers.flat_map(|layer| experts().map(|expert| placement.replicas(layer.layer, expert).len()));
    copies.min().unwrap_or(0)
}

/// The layout that the options ask for: the file's, or the flags'. Without a number of copies, as many as
/// the redundant slots give everyone.
pub(crate) fn layout(options: &RouterOptions, config: &ModelConfig) -> Result<Layout, RouterError> {
    if let Some(path) = &options.layout_file {
        return read_layout(path);
    }
    let affordable = affordable_copies(config.n_routed_experts, options.redundant_slots);
    let min_copies = options.min_copies.map_or(affordable, |copies| usize::from(copies.get()));
    Ok(Layout {
        shards: options.shards.get(),
        redundant_slots: u32::try_from(options.redundant_slots).unwrap_or(u32::MAX),
        min_copies: u16::try_from(min_copies).unwrap_or(u16::MAX),
    })
}

/// Reads a layout file.
pub(crate) fn read_layout(path: &Path) -> Result<Layout, RouterError> {
    let text = read(path, MAX_LAYOUT_BYTES)?;
    serde_json::from_slice(&text).map_err(|error| RouterError::File {
        path: PathBuf::from(path),
        problem: format!("{error}; a layout is {{\"shards\": 4, \"redundantSlots\": 32, \"minCopies\": 2}}"),
    })
}

fn expert_load(options: &RouterOptions, config: &ModelConfig) -> Result<ExpertLoad, RouterError> {
    let beside = options.model_dir.join(LOAD_FILE);
    let path = match &options.expert_load {
        Some(path) => path.clone(),
        None if beside.is_file() => beside,
        None => {
            let uniform = ExpertLoad::uniform(config.served_moe_layers(), config.n_routed_experts);
            return uniform.map_err(|source| RouterError::Load { path: options.model_dir.clone(), source });
        }
    };
    let failed = |source| RouterError::Load { path: path.clone(), source };
    // A load that was measured while an MTP layer was placed says something about it; nobody needs that now.
    let (served, known): (Vec<_>, Vec<_>) =
        (config.served_moe_layers().collect(), config.moe_layers().collect());
    let idle = |layer| known.contains(&layer) && !served.contains(&layer);
    let load = read_load(&path)?.without(idle).map_err(failed)?;
    load.check_model(served.iter().copied(), config.n_routed_experts).map_err(failed)?;
    tracing::info!(path = %path.display(), "placements are planned from measured expert load");
    Ok(load)
}

fn read_load(path: &Path) -> Result<ExpertLoad, RouterError> {
    let text = read(path, MAX_LOAD_BYTES)?;
    serde_json::from_slice(&text).map_err(|error| RouterError::File {
        path: PathBuf::from(path),
        problem: format!("{error}; export one from /expert-load of a router's admin port"),
    })
}

fn read(path: &Path, most: u64) -> Result<Vec<u8>, RouterError> {
    let failed = |problem: String| RouterError::File { path: PathBuf::from(path), problem };
    let size = std::fs::metadata(path).map_err(|error| failed(error.to_string()))?.len();
    if size > most {
        return Err(failed(format!("{size} bytes, at most {most} are read")));
    }
    std::fs::read(path).map_err(|error| failed(error.to_string()))
}

#[cfg(test)]
mod tests;
