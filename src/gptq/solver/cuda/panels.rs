//! The plan of a solve: panels of columns, the kernel of `gptq_block.cu` for each, and its shared memory. It is plain data, so
//! that tests need no device.

use std::ops::Range;

/// Output features of a thread block.
pub(super) const LANES: usize = 32;
/// Columns that a thread block solves between two barriers.
const STEP: usize = 32;

/// Columns of a panel, the widest first. The widest panel that fits the device's shared memory is used.
const WIDTHS: [usize; 4] = [256, 192, 128, 64];

/// Finalists that are compared at the same time, the most first: each takes a warp and shared memory.
const AT_ONCE: [usize; 4] = [8, 4, 2, 1];

/// A search for the scales of groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Search {
    /// Factors of the range's scale that are tried.
    pub(super) candidates: usize,
    /// The best of them by the diagonal, which are compared by the block; 1 without that comparison.
    pub(super) finalists: usize,
    /// Finalists that are compared at the same time.
    pub(super) at_once: usize,
}

impl Search {
    /// All finalists at the same time, as far as a block has warps.
    pub(super) fn new(candidates: usize, finalists: usize) -> Self {
        let finalists = finalists.clamp(1, candidates);
        Self { candidates, finalists, at_once: finalists.min(AT_ONCE[0]) }
    }
}

/// A panel kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    /// Scales are fitted at the beginning of their groups; the panel has whole groups.
    Fitted,
    /// The same, with scales searched for.
    Searched(Search),
    /// Scales are given.
    Given,
    /// Compensates the weights of a group that is wider than a panel for the columns before it, and chooses no codes.
    Compensate,
}

impl Mode {
    /// Its name in `gptq_block.cu`.
    pub(super) fn kernel(self) -> &'static str {
        match self {
            Self::Fitted => "gptq_solve_fitted",
            Self::Searched(_) => "gptq_solve_searched",
            Self::Given => "gptq_solve_given",
            Self::Compensate => "gptq_compensate",
        }
    }

    /// Dynamic shared memory of a block for a panel of `columns`, bytes: `layout` in `gptq_block.cu`.
    pub(super) fn shared_memory(self, columns: usize, group_size: usize) -> usize {
        let padded = columns.next_multiple_of(STEP);
        // The columns of a group, in whole steps.
        let rows = group_size.min(columns).next_multiple_of(STEP);
        let extra = match self {
            // Scales, their inverses and zeros of two steps.
            Self::Given => 2 * 3 * STEP * LANES,
            Self::Compensate => 0,
            Self::Fitted => sums_of_group(padded, group_size),
            // The same memory has the costs of all candidates, then the finalists' codes.
            Self::Searched(Search { candidates, at_once, .. }) => {
                let codes = at_once * rows * LANES / size_of::<f32>();
                sums_of_group(padded, group_size).max(LANES * candidates).max(codes)
            }
        };
        let search = match self {
            // Compensated weights and their range; costs and numbers of the finalists; the place in the walk.
            Self::Searched(search) => LANES * (rows + 2 + 2 * search.finalists) + 4,
            _ => 0,
        };
        let residuals = padded * LANES;
        let factor = STEP * padded + 2 * STEP * STEP;
        let weights = 2 * STEP * LANES;
        let changes = STEP * LANES;
        let of_columns = 3 * (padded + STEP);
        let codes = STEP * LANES / size_of::<f32>();
        size_of::<f32>() * (residuals + extra + factor + weights + changes + of_columns + codes + search)
    }
}

/// fp32 values of a group's running sums while it is compensated, in a panel of `padded` columns.
fn sums_of_group(padded: usize, group_size: usize) -> usize {
    // A group of one step keeps them in registers.
    if group_size <= STEP {
        return 0;
    }
    // The steps that a group touches, wherever it begins.
    let touched = if group_size.is_multiple_of(STEP) { 0 } else { STEP - 1 };
    LANES * padded.min((group_size + touched).next_multiple_of(STEP))
}

/// One launch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Panel {
    pub(super) mode: Mode,
    /// Positions in quantization order.
    pub(super) columns: Range<usize>,
    /// [`Mode::Compensate`]: the group that the panel is part of.
    pub(super) group: Range<usize>,
}

impl Panel {
    /// Whether it begins its group.
    pub(super) fn is_first(&self) -> bool {
        self.columns.start == self.group.start
    }

    /// Whether it ends its group. The group's scale is then fitted.
    pub(super) fn is_last(&self) -> bool {
        self.columns.end == self.group.end
    }
}

/// All launches for one stack of weights, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) panels: Vec<Panel>,
    /// Columns of the widest panel.
    pub(super) width: usize,
    /// Columns of a group that is wider than a panel, else 0.
    pub(super) wide_group: usize,
}

impl Plan {
    /// As [`Plan::new`] with unknown scales, if they are searched for. The kernel searches groups that fit a panel. Scales of
    /// wider groups are computed once all columns before them are solved, so no panel has columns of two groups.
    pub(super) fn searched(
        k: usize,
        group_size: usize,
        search: Search,
        shared_memory: usize,
    ) -> Option<Self> {
        let ways = AT_ONCE.into_iter().filter(|&at_once| at_once <= search.at_once);
        let ways = ways.flat_map(|at_once| {
            let mode = Mode::Searched(Search { at_once, ..search });
            let widths = WIDTHS.into_iter().filter(|&width| group_size <= width);
            widths.map(move |width| (mode, width / group_size * group_size))
        });
        let mut fitting =
            ways.filter(|&(mode, width)| mode.shared_memory(width, group_size) <= shared_memory);
        if let Some((mode, width)) = fitting.next() {
            return Some(Self::of(mode, k, width));
        }
        let fits = |width: &usize| Mode::Given.shared_memory(*width, group_size) <= shared_memory;
        let width = WIDTHS.into_iter().find(fits)?;
        let panels = by_group(k, width, group_size, &[Mode::Given]);
        Some(Self { panels, width: width.min(group_size).min(k), wide_group: 0 })
    }

    /// Panels for `k` columns in groups of `group_size`, whose scales are `known` beforehand or fitted on the way. Blocks of
    /// the device can have `shared_memory` bytes; `None` if that is too little for any width.
    pub(super) fn new(k: usize, group_size: usize, known: bool, shared_memory: usize) -> Option<Self> {
        let fits = |mode: Mode, width: usize| mode.shared_memory(width, group_size) <= shared_memory;
        WIDTHS.into_iter().find_map(|width| {
            if !known && group_size <= width {
                // As many whole groups as fit.
                let width = width / group_size * group_size;
                return fits(Mode::Fitted, width).then(|| Self::of(Mode::Fitted, k, width));
            }
            if !fits(Mode::Given, width) {
                return None;
            }
            if known {
                return Some(Self::of(Mode::Given, k, width));
            }
            // Each group twice: for its scale, then for its codes.
            let panels = by_group(k, width, group_size, &[Mode::Compensate, Mode::Given]);
            Some(Self { panels, width: width.min(k), wide_group: group_size.min(k) })
        })
    }

    /// Whether scales of groups are searched for between panels.
    pub(super) fn searches_between(&self, searched: bool, known: bool) -> bool {
        searched && !known && self.panels.iter().all(|panel| panel.mode == Mode::Given)
    }

    fn of(mode: Mode, k: usize, width: usize) -> Self {
        let panels = parts(0..k, width).map(|columns| Panel { mode, columns, group: 0..k });
        Self { panels: panels.collect(), width: width.min(k), wide_group: 0 }
    }
}

/// Panels of up to `width` columns in each of `modes`, group by group.
fn by_group(k: usize, width: usize, group_size: usize, modes: &[Mode]) -> Vec<Panel> {
    let of_group = |group: Range<usize>| {
        modes.iter().flat_map(move |&mode| {
            let panel = |columns| Panel { mode, columns, group: group.clone() };
            parts(group.clone(), width).map(panel).collect::<Vec<_>>()
        })
    };
    parts(0..k, group_size).flat_map(of_group).collect()
}

/// `range` in parts of `width`; the last part may be shorter.
fn parts(range: Range<usize>, width: usize) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.step_by(width).map(move |start| start..(start + width).min(end))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Shared memory a block can have, bytes: compute capability 8.0, 8.6 and 8.9, 9.0.
    const AMPERE: usize = 163 << 10;
    const ADA: usize = 99 << 10;
    const HOPPER: usize = 227 << 10;

    fn plan(k: usize, group_size: usize, known: bool, shared_memory: usize) -> Plan {
        Plan::new(k, group_size, known, shared_memory).unwrap()
    }

    /// Figures of the kernels' author: P = 256 for groups of 32, 64, 128, 256, and for given scales.
    #[test]
    fn shared_memory_of_the_usual_panels() {
        let fitted = [32, 64, 128, 256].map(|size| Mode::Fitted.shared_memory(256, size));
        assert_eq!(fitted, [90_496, 98_688, 106_880, 123_264]);
        assert_eq!(Mode::Given.shared_memory(256, 128), 115_072);
        assert_eq!(Mode::Compensate.shared_memory(256, 1024), 90_496);
        // Groups of 48 begin at any multiple of 16: three steps of 32 columns.
        assert_eq!(Mode::Fitted.shared_memory(240, 48) - Mode::Fitted.shared_memory(240, 32), 4 * 32 * 96);
    }

    #[test]
    fn panels_are_as_wide_as_the_device_allows() {
        for (size, known, shared_memory, width) in [
            (128, false, HOPPER, 256),
            (128, false, AMPERE, 256),
            (128, false, ADA, 128),
            (32, false, ADA, 256),
            (48, false, HOPPER, 240),
            (100, false, HOPPER, 200),
            (256, false, HOPPER, 256),
            (256, false, ADA, 192),
            (128, true, HOPPER, 256),
            (128, true, ADA, 192),
            (4096, true, HOPPER, 256),
        ] {
            assert_eq!(plan(4096, size, known, shared_memory).width, width, "{size} {known} {shared_memory}");
        }
        assert_eq!(Plan::new(4096, 128, false, 48 << 10), None);
    }

    #[test]
    fn a_group_wider_than_a_panel_is_compensated_before_it_is_solved() {
        let plan = plan(1100, 600, false, HOPPER);
        let panel = |mode, columns, group| Panel { mode, columns, group };
        let (compensate, given) = (Mode::Compensate, Mode::Given);
        assert_eq!(
            plan.panels,
            [
                panel(compensate, 0..256, 0..600),
                panel(compensate, 256..512, 0..600),
                panel(compensate, 512..600, 0..600),
                panel(given, 0..256, 0..600),
                panel(given, 256..512, 0..600),
                panel(given, 512..600, 0..600),
                panel(compensate, 600..856, 600..1100),
                panel(compensate, 856..1100, 600..1100),
                panel(given, 600..856, 600..1100),
                panel(given, 856..1100, 600..1100),
            ]
        );
        assert!(plan.panels[0].is_first() && !plan.panels[0].is_last());
        assert!(plan.panels[2].is_last() && !plan.panels[2].is_first());
        assert_eq!((plan.width, plan.wide_group), (256, 600));
    }

    /// The default preset: 92 candidates, of which 8 are compared by the block.
    const STANDARD: Search = Search { candidates: 92, finalists: 8, at_once: 8 };

    #[test]
    fn searched_panels_have_whole_groups_and_as_many_finalists_as_fit() {
        for (size, shared_memory, width, at_once) in [
            (32, HOPPER, 256, 8),
            (64, HOPPER, 256, 8),
            (128, HOPPER, 256, 8),
            (256, HOPPER, 256, 8),
            (128, AMPERE, 256, 8),
            (128, ADA, 128, 4),
            (64, ADA, 192, 8),
            (32, ADA, 192, 8),
            (48, HOPPER, 240, 8),
        ] {
            let plan = Plan::searched(4096, size, STANDARD, shared_memory).unwrap();
            let expected = Mode::Searched(Search { at_once, ..STANDARD });
            assert_eq!((plan.panels[0].mode, plan.width), (expected, width), "{size} {shared_memory}");
        }
        // 4 · (64·256 + extra + 5376 + 3·288), of which the finalists' codes are 8·128·32 bytes; compensated weights, two ranges,
        // two times 8 finalists, and a walk.
        let bytes = Mode::Searched(STANDARD).shared_memory(256, 128);
        assert_eq!(bytes, 4 * (64 * 256 + 8192 + 5376 + 3 * 288) + 4 * (32 * (128 + 2 + 16) + 4));
        // Too wide: scales are searched for between panels.
        let wide = Plan::searched(2048, 512, STANDARD, HOPPER).unwrap();
        assert!(
            wide.panels.iter().all(|panel| panel.mode == Mode::Given) && wide.searches_between(true, false)
        );
        assert_eq!(Search::new(1, 0), Search { candidates: 1, finalists: 1, at_once: 1 });
        assert_eq!(Search::new(92, 0).finalists, 1);
    }

    proptest! {
        /// Every column is solved once and in order; no group is cut; the device's memory suffices.
        #[test]
        fn plans_are_complete(
            k in 1usize..5000,
            group_size in 16usize..1025,
            known: bool,
            search in prop::option::of((1usize..160, 1usize..9)),
            shared_memory in prop::sample::select(&[ADA, AMPERE, HOPPER][..]),
        ) {
            let search = search.filter(|_| !known).map(|(c, finalists)| Search::new(c, finalists));
            let plan = match search {
                Some(search) => Plan::searched(k, group_size, search, shared_memory).unwrap(),
                None => plan(k, group_size, known, shared_memory),
            };
            let mut solved = 0;
            for panel in &plan.panels {
                let columns = panel.columns.clone();
                prop_assert!(!columns.is_empty() && columns.len() <= plan.width);
                prop_assert!(panel.mode.shared_memory(columns.len(), group_size) <= shared_memory);
                match panel.mode {
                    Mode::Compensate => {
                        // Its group's columns are not solved yet, and all before it are.
                        prop_assert_eq!(panel.group.start, solved);
                        prop_assert!(panel.group.start <= columns.start && columns.end <= panel.group.end);
                        continue;
                    }
                    Mode::Fitted | Mode::Searched(_) => prop_assert!(columns.start.is_multiple_of(group_size)),
                    Mode::Given => prop_assert!(known || columns.end <= panel.group.end),
                }
                prop_assert_eq!(columns.start, solved);
                solved = columns.end;
                let whole = solved == k || solved.is_multiple_of(group_size);
                prop_assert!(!matches!(panel.mode, Mode::Fitted | Mode::Searched(_)) || whole);
            }
            prop_assert_eq!(solved, k);
            let compensated: usize =
                plan.panels.iter().filter(|p| p.mode == Mode::Compensate).map(|p| p.columns.len()).sum();
            prop_assert_eq!(compensated, if plan.wide_group > 0 { k } else { 0 });
        }
    }
}
